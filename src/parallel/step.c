#include "parallel/step.h"

#include "base/clock.h"
#include "base/hash.h"
#include "base/memory.h"
#include <math.h>
#include <stdlib.h>

/* What events hand to later ones within a step. */
struct step_state {
    struct step_input input;
    struct loss_scales scales;
    struct step_result result;
};

/* What the ranks add up at the end of a step. */
enum { SUM_NORM, SUM_COPIES, SUM_LOSS, SUM_BYTES, SUM_STATS };

/* SUM_NORM and SUM_COPIES are the same number added up in two ways, if all copies of a gradient are the same. */
static const double COPIES_TOLERANCE = 1e-9;

struct range step_sequences(const struct mesh *mesh, int64_t micro_batch_sequences) {
    return range_part(micro_batch_sequences, mesh_group_size(mesh, RANKS_BATCH_AXES),
                      mesh_group_rank(mesh, RANKS_BATCH_AXES));
}

int64_t step_sequences_most(const struct mesh *mesh, int64_t micro_batch_sequences) {
    int64_t ranks = mesh_group_size(mesh, RANKS_BATCH_AXES);
    return (micro_batch_sequences + ranks - 1) / ranks;
}

enum status step_workspace_create(const struct model *model, struct ranks *ranks, struct workspace_options options,
                                  int64_t limit_bytes, struct workspace **workspace,
                                  struct expert_parallel **exchange) {
    const struct model_config *c = &model->config;
    *exchange = NULL;
    if (c->num_experts == 0 || ranks->experts.size == 1)
        return workspace_create(model, options, workspace);
    struct expert_parallel_options wanted = {
        .comm = &ranks->experts,
        .device = model->device,
        .context = model->context,
        .token_count = options.batch * options.sequence_length,
        .width = c->hidden_size,
        .inner = c->moe_intermediate_size,
        .expert_count = c->num_experts,
        .choice_count = c->num_experts_per_tok,
        .slot_count = options.training && !options.recompute ? model->table.block_count : 1,
        .training = options.training,
        .limit_bytes = limit_bytes,
    };
    TRY(expert_parallel_create(&wanted, exchange));
    enum status status = workspace_create_exchanging(model, options, expert_parallel_ops(), *exchange, workspace);
    if (status != STATUS_OK) {
        expert_parallel_destroy(*exchange);
        *exchange = NULL;
    }
    return status;
}

struct schedule_options step_schedule_options(const struct model *model, const struct traffic *traffic,
                                              const struct step_settings *settings, bool recompute) {
    return (struct schedule_options){model->table.block_count, settings->micro_batch_count, recompute,
                                     model->sharding.zero,     traffic_gathers(traffic),    traffic_replicates(traffic),
                                     settings->fragment_count};
}

int64_t step_sum_count(const struct model_config *c) {
    return SUM_STATS + (c->num_experts > 0 ? c->num_hidden_layers * (2 + 2 * c->num_experts) : 0);
}

static enum status take_memory(struct step_runner *runner) {
    struct workspace *w = runner->workspace;
    int64_t rows = w->options.batch * w->options.sequence_length;
    runner->sum_count = (int)step_sum_count(&runner->model->config);
    runner->host_ids_bytes = (size_t)(2 * rows * runner->settings.micro_batch_count) * sizeof *runner->host_ids;
    TRY(runner->model->device->alloc_host((void **)&runner->host_ids, runner->host_ids_bytes));
    size_t row_count = (size_t)runner->model->table.count, row_bytes = row_count * sizeof(double);
    TRY(memory_alloc(&runner->sums, (size_t)runner->sum_count, sizeof *runner->sums));
    TRY(memory_alloc(&runner->seals, 2 + 2 * (size_t)runner->ranks->batch.size, sizeof *runner->seals));
    TRY(memory_alloc(&runner->host_row_squares, row_count, sizeof *runner->host_row_squares));
    TRY(arena_init(&runner->arena, runner->model->device, (row_bytes + 63) / 64 * 64));
    runner->row_squares = tensor_1d(arena_take(&runner->arena, row_bytes), DTYPE_F64, (int64_t)row_count);
    return STATUS_OK;
}

enum status step_runner_init(struct step_runner *runner, struct model *model, struct workspace *workspace,
                             struct ranks *ranks, const struct optimizer_settings *optimizer,
                             struct step_settings settings) {
    if (settings.micro_batch_sequences == 0)
        settings.micro_batch_sequences = workspace->options.batch;
    CHECK_OP(workspace->options.batch, >=, range_count(step_sequences(&ranks->mesh, settings.micro_batch_sequences)));
    *runner = (struct step_runner){
        .model = model, .workspace = workspace, .ranks = ranks, .optimizer = optimizer, .settings = settings};
    enum status status = traffic_create(model, ranks, settings.gradient_wire, &runner->traffic);
    if (status == STATUS_OK)
        status = schedule_build(&runner->schedule,
                                step_schedule_options(model, runner->traffic, &settings, workspace->options.recompute));
    if (status == STATUS_OK)
        status = balance_init(&runner->balance, model, workspace, &ranks->batch);
    if (status == STATUS_OK && settings.repeats && ranks->batch.size == 1)
        repeats_init(&runner->repeats, &runner->schedule, model->device);
    if (status == STATUS_OK)
        status = take_memory(runner);
    if (status != STATUS_OK)
        step_runner_release(runner);
    return status;
}

void step_runner_release(struct step_runner *runner) {
    repeats_release(&runner->repeats);
    balance_release(&runner->balance);
    traffic_destroy(runner->traffic);
    schedule_release(&runner->schedule);
    if (runner->host_ids)
        runner->model->device->release_host(runner->host_ids, runner->host_ids_bytes);
    free(runner->sums);
    free(runner->seals);
    free(runner->host_row_squares);
    arena_release(&runner->arena);
    *runner = (struct step_runner){0};
}

enum status step_refresh(struct step_runner *runner) {
    return traffic_refresh(runner->traffic);
}

/* Memory of its own for each column of a step: nobody waits until the device has it. The norm does, before the next step. */
static void load_column(struct step_runner *runner, const int32_t *tokens, int micro_batch, int shift, struct tensor to) {
    const struct workspace *w = runner->workspace;
    int64_t batch = w->batch, length = w->sequence_length, rows = w->options.batch * w->options.sequence_length;
    int32_t *ids = runner->host_ids + (2 * micro_batch + shift) * rows;
    for (int64_t b = 0; b < batch; b++)
        for (int64_t t = 0; t < length; t++)
            ids[b * length + t] = tokens[b * (length + 1) + t + shift];
    runner->model->device->copy_from_host_later(to.data, ids, tensor_bytes(to));
}

static int64_t step_tokens(const struct step_runner *runner) {
    return runner->settings.micro_batch_count * runner->settings.micro_batch_sequences *
           runner->workspace->options.sequence_length;
}

static void run_load(struct step_runner *runner, struct step_state *state, int micro_batch) {
    struct workspace *w = runner->workspace;
    int64_t sequences = runner->settings.micro_batch_sequences, length = w->options.sequence_length;
    struct range mine = step_sequences(&runner->ranks->mesh, sequences);
    workspace_shape(w, runner->model, range_count(mine), length);
    w->writes_gradients = micro_batch == 0;
    const int32_t *tokens = state->input.tokens + (micro_batch * sequences + mine.begin) * (length + 1);
    load_column(runner, tokens, micro_batch, 0, w->ids);
    load_column(runner, tokens, micro_batch, 1, w->targets);
    state->scales = model_loss_scales(runner->model, step_tokens(runner), (micro_batch + 1) * sequences * length);
}

static void run_clear(struct step_runner *runner) {
    runner->model->context.ops->fill(runner->model->cleared_gradients, 0);
    model_clear_sums(runner->model, runner->workspace);
}

static double read_sum(const struct step_runner *runner, struct tensor sum) {
    double value;
    runner->model->device->copy_to_host(&value, sum.data, sizeof value);
    return value;
}

/* Ranks that own the same part of a row, and whether this is the first of them: every element counts once. */
struct copies {
    int count;
    bool first;
};

static struct copies count_copies(const struct step_runner *runner, int row) {
    const struct sharding *sharding = &runner->model->sharding;
    struct layout own = sharding_own_layout(sharding, &runner->model->table.rows[row]);
    struct copies copies = {1, true};
    for (int axis = MESH_REPLICATE; axis < MESH_AXIS_COUNT; axis++) {
        if (own.axis[axis].kind != PLACEMENT_REPLICATE)
            continue;
        copies.count *= sharding->mesh.size[axis];
        copies.first = copies.first && sharding->mesh.coordinate[axis] == 0;
    }
    return copies;
}

/* Squares of this rank's own gradients: what counts for the norm, and its share of what all copies make together. */
static void add_squares(struct step_runner *runner) {
    const struct model *model = runner->model;
    const struct kernel_ops *ops = model->context.ops;
    ops->fill(runner->row_squares, 0);
    if (ops->sum_squares_each)
        ops->sum_squares_each(model->own_gradient, model->table.count, runner->row_squares);
    for (int i = 0; i < model->table.count && !ops->sum_squares_each; i++)
        ops->sum_squares(model->own_gradient[i], tensor_rows(runner->row_squares, i, 1));
    model->device->copy_to_host(runner->host_row_squares, runner->row_squares.data, tensor_bytes(runner->row_squares));
    runner->sums[SUM_NORM] = runner->sums[SUM_COPIES] = 0;
    for (int i = 0; i < model->table.count; i++) {
        struct copies copies = count_copies(runner, i);
        if (copies.first)
            runner->sums[SUM_NORM] += runner->host_row_squares[i];
        runner->sums[SUM_COPIES] += runner->host_row_squares[i] / copies.count;
    }
}

static void collect_sums(struct step_runner *runner) {
    struct workspace *w = runner->workspace;
    add_squares(runner);
    runner->norm_bytes = ranks_sent_bytes(runner->ranks);
    runner->sums[SUM_LOSS] = read_sum(runner, w->loss_sum);
    runner->sums[SUM_BYTES] = (double)(runner->norm_bytes - runner->begin_bytes + runner->tail_bytes);
    if (runner->sum_count > SUM_STATS)
        runner->model->device->copy_to_host(runner->sums + SUM_STATS, w->all_stats.data, tensor_bytes(w->all_stats));
}

/* Every rank shows a hash of the sums that it arrived at, with its complement: one whose sums came damaged shows
 * another hash than the rest, and all see it; a seal that itself came damaged is none, and is passed over. */
static enum status compare_sums(struct step_runner *runner, bool *same) {
    struct comm *comm = &runner->ranks->batch;
    uint64_t *mine = runner->seals, *all = mine + 2;
    *same = true;
    if (comm->size == 1)
        return STATUS_OK;
    mine[0] = hash_bytes(runner->sums, (size_t)runner->sum_count * sizeof *runner->sums, 0);
    mine[1] = ~mine[0];
    TRY(comm_share(comm, mine, STEP_SEAL_BYTES, all));
    for (int r = 0; r < comm->size; r++)
        if (all[2 * r] == ~all[2 * r + 1] && all[2 * r] != mine[0])
            *same = false;
    return STATUS_OK;
}

/* A limit of 0 is none. */
static bool is_above(double value, double limit) {
    return limit > 0 && value > limit;
}

static enum step_skip judge(const struct step_runner *runner, const struct step_state *state, bool same_sums) {
    const struct step_result *result = &state->result;
    const struct step_limits *limits = &state->input.limits;
    double norm = runner->sums[SUM_NORM], copies = runner->sums[SUM_COPIES];
    if (!same_sums)
        return STEP_RANKS_DISAGREE;
    if (!isfinite(norm) || !isfinite(copies) || !isfinite(result->loss))
        return STEP_NOT_FINITE;
    if (runner->part == STEP_WHOLE && fabs(copies - norm) > COPIES_TOLERANCE * norm) /* else nothing was summed */
        return STEP_RANKS_DISAGREE;
    if (is_above(result->loss, limits->loss))
        return STEP_LOSS_SPIKE;
    return is_above(result->gradient_norm, limits->gradient_norm) ? STEP_GRADIENT_SPIKE : STEP_UPDATED;
}

const char *step_skip_reason(enum step_skip skip) {
    static const char *const reasons[] = {[STEP_UPDATED] = "none",
                                          [STEP_NOT_FINITE] = "not finite",
                                          [STEP_LOSS_SPIKE] = "a loss far above the last ones",
                                          [STEP_GRADIENT_SPIKE] = "a gradient far above the last ones",
                                          [STEP_RANKS_DISAGREE] = "the ranks do not agree on the gradient"};
    return reasons[skip];
}

static enum status run_gradient_norm(struct step_runner *runner, struct step_state *state) {
    struct workspace *w = runner->workspace;
    struct step_result *result = &state->result;
    bool same_sums;
    collect_sums(runner);
    TRY(comm_sum_f64(&runner->ranks->batch, runner->sums, runner->sum_count));
    TRY(compare_sums(runner, &same_sums));
    if (runner->sum_count > SUM_STATS)
        runner->model->device->copy_from_host(w->all_stats.data, runner->sums + SUM_STATS, tensor_bytes(w->all_stats));
    result->gradient_norm = sqrt(runner->sums[SUM_NORM]);
    result->loss = runner->sums[SUM_LOSS] * state->scales.token;
    result->comm_bytes = (int64_t)runner->sums[SUM_BYTES];
    result->skipped = judge(runner, state, same_sums);
    result->lr = optimizer_lr(runner->optimizer, state->input.step, state->input.step_count);
    if (runner->herald.before_update)
        runner->herald.before_update(runner->herald.context);
    return STATUS_OK;
}

/* A tensor that begins within a block has no whole ones. */
static struct update_hashes hashes_of(const struct step_runner *runner, int row) {
    const struct model *model = runner->model;
    const struct known_hashes *known = runner->hashes;
    return (struct update_hashes){known_hashes_at(known, model->own_weight[row].data),
                                  known_hashes_at(known, model->moment1[row].data),
                                  known_hashes_at(known, model->moment2[row].data)};
}

static void run_optimizer(struct step_runner *runner, const struct step_state *state, int group) {
    struct model *model = runner->model;
    const struct packed none = {0};
    for (int i = 0; i < model->table.count && !state->result.skipped; i++) {
        const struct parameter *row = &model->table.rows[i];
        if (parameter_group(row) != group)
            continue;
        struct adamw_settings settings = optimizer_update_settings(
            runner->optimizer, state->input.step, state->input.step_count, state->result.gradient_norm, row->is_matrix);
        model->context.ops->adamw(model->own_weight[i], model->own_gradient[i], model->moment1[i], model->moment2[i],
                                  settings, model_row_is_whole(model, i) ? model->packed[i] : none, hashes_of(runner, i));
    }
}

static enum status run_outer_send(struct step_runner *runner, struct step_state *state, int fragment) {
    struct outer *outer = runner->outer;
    int64_t step = state->input.step;
    if (!outer || outer_plan_sends(&outer->options.plan, step) != fragment)
        return STATUS_OK;
    state->result.outer_bytes = outer_island_bytes(runner->model, &outer->options, step);
    return outer_send(outer, step, state->result.loss);
}

static enum status run_outer_apply(struct step_runner *runner, struct step_state *state, int fragment) {
    struct outer *outer = runner->outer;
    if (!outer || outer_plan_applies(&outer->options.plan, state->input.step) != fragment || outer->mixing < 0)
        return STATUS_OK;
    state->result.applied = true;
    return outer_apply(outer);
}

/* Events that move parameters or gradients. */
static enum status run_transfer(struct step_runner *runner, const struct event *event) {
    switch (event->kind) {
    case EVENT_GATHER:
        return traffic_gather_start(runner->traffic, event->block);
    case EVENT_GATHERED:
        return traffic_gather_finish(runner->traffic, event->block);
    case EVENT_REDUCE:
        return traffic_reduce_start(runner->traffic, event->block);
    case EVENT_REDUCED:
        return traffic_reduce_finish(runner->traffic, event->block);
    case EVENT_REPLICATE:
        return traffic_replicate_start(runner->traffic, event->block);
    case EVENT_REPLICATED:
        return traffic_replicate_finish(runner->traffic, event->block);
    default:
        CHECK(!"a transfer");
        return STATUS_OK;
    }
}

static enum status run_event(struct step_runner *runner, struct step_state *state, const struct event *event) {
    struct model *m = runner->model;
    struct workspace *w = runner->workspace;
    switch (event->kind) {
    case EVENT_CLEAR:
        run_clear(runner);
        return STATUS_OK;
    case EVENT_LOAD:
        run_load(runner, state, event->micro_batch);
        return STATUS_OK;
    case EVENT_GATHER:
    case EVENT_GATHERED:
    case EVENT_REDUCE:
    case EVENT_REDUCED:
    case EVENT_REPLICATE:
    case EVENT_REPLICATED:
        return run_transfer(runner, event);
    case EVENT_EMBED:
        model_embed_forward(m, w);
        return STATUS_OK;
    case EVENT_ATTENTION:
        block_attention_forward(m, w, event->block, NULL);
        return STATUS_OK;
    case EVENT_ROUTE:
        return block_route_forward(m, w, event->block, true);
    case EVENT_EXCHANGE:
        return block_dispatch(m, w, event->block);
    case EVENT_EXPERTS:
        return block_experts_forward(m, w, event->block);
    case EVENT_EXCHANGE_BACK:
        return block_combine(m, w, event->block);
    case EVENT_HEAD:
        model_head(m, w, state->scales.token, true);
        return STATUS_OK;
    case EVENT_COUNTS:
        return balance_start(&runner->balance, w, event->block);
    case EVENT_CLEAR_BLOCK:
        model_clear_slot(m, event->block);
        return STATUS_OK;
    case EVENT_RECOMPUTE:
        return block_recompute(m, w, event->block);
    case EVENT_EXCHANGE_BACK_GRAD:
        return block_combine_backward(m, w, event->block);
    case EVENT_EXPERTS_GRAD:
        return block_experts_backward(m, w, event->block);
    case EVENT_EXCHANGE_GRAD:
        return block_dispatch_backward(m, w, event->block);
    case EVENT_ROUTE_GRAD:
        TRY(balance_finish(&runner->balance, m, w, event->block));
        block_route_backward(m, w, event->block, state->scales.router);
        return STATUS_OK;
    case EVENT_ATTENTION_GRAD:
        block_attention_backward(m, w, event->block);
        return STATUS_OK;
    case EVENT_EMBED_GRAD:
        model_embed_backward(m, w);
        return STATUS_OK;
    case EVENT_GRADIENT_NORM:
        return run_gradient_norm(runner, state);
    case EVENT_OPTIMIZER:
        run_optimizer(runner, state, event->block);
        return STATUS_OK;
    case EVENT_OUTER_SEND:
        return run_outer_send(runner, state, event->block);
    case EVENT_OUTER_APPLY:
        return run_outer_apply(runner, state, event->block);
    case EVENT_KIND_COUNT:
        break;
    }
    CHECK(!"an event that does not exist");
    return STATUS_OK;
}

static bool is_transfer(enum event_kind kind) {
    return kind == EVENT_GATHER || kind == EVENT_GATHERED || kind == EVENT_REDUCE || kind == EVENT_REDUCED ||
           kind == EVENT_REPLICATE || kind == EVENT_REPLICATED;
}

/* What is measured alone leaves out the rest; packing what was gathered is computing. */
static enum status run_part(struct step_runner *runner, struct step_state *state, const struct event *event) {
    if (runner->part == STEP_TRANSFERS && !is_transfer(event->kind))
        return STATUS_OK;
    if (runner->part == STEP_COMPUTE && event->kind == EVENT_GATHERED)
        model_pack_gathered(runner->model, event->block);
    if (runner->part == STEP_COMPUTE && is_transfer(event->kind))
        return STATUS_OK;
    return run_event(runner, state, event);
}

static enum status run_event_at(struct step_runner *runner, struct step_state *state, int i) {
    const struct event *event = &runner->schedule.events[i];
    for (int k = 0; k < event->wait_count; k++) /* in order of the list all that it waits for is done */
        CHECK_OP(event->waits[k], <, i);
    double begin = runner->observer.event_done ? clock_seconds() : 0;
    TRY(run_part(runner, state, event));
    if (runner->observer.event_done) {
        runner->model->device->finish();
        runner->observer.event_done(runner->observer.context, event, clock_seconds() - begin);
    }
    return STATUS_OK;
}

struct stretch_call {
    struct step_runner *runner;
    struct step_state *state;
};

static enum status ask_for_stretch(void *context, const struct stretch *stretch) {
    const struct stretch_call *call = context;
    for (int i = stretch->begin; i < stretch->end; i++)
        TRY(run_event_at(call->runner, call->state, i));
    return STATUS_OK;
}

enum status step_run(struct step_runner *runner, struct step_input input, struct step_result *result) {
    struct step_state state = {.input = input};
    struct stretch_call call = {runner, &state};
    bool repeats = runner->part == STEP_WHOLE && !runner->observer.event_done;
    state.scales = model_loss_scales(runner->model, step_tokens(runner), 0);
    runner->begin_bytes = ranks_sent_bytes(runner->ranks);
    for (int i = 0, end; i < runner->schedule.count; i = end) {
        struct stretch *stretch = repeats ? repeats_at(&runner->repeats, i) : NULL;
        end = stretch ? stretch->end : i + 1; /* it is gone where it could not be recorded */
        if (stretch)
            TRY(repeats_run(&runner->repeats, stretch, ask_for_stretch, &call));
        else
            TRY(run_event_at(runner, &state, i));
    }
    runner->tail_bytes = ranks_sent_bytes(runner->ranks) - runner->norm_bytes;
    *result = state.result;
    return STATUS_OK;
}
