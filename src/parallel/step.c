#include "parallel/step.h"

#include "base/clock.h"
#include "base/memory.h"
#include <math.h>
#include <stdlib.h>

/* What events hand to later ones within a step. */
struct step_state {
    struct step_input input;
    struct loss_scales scales;
    struct step_result result;
};

enum status step_runner_init(struct step_runner *runner, struct model *model, struct workspace *workspace,
                             struct comm *comm, const struct optimizer_settings *optimizer, int micro_batch_count) {
    *runner = (struct step_runner){.model = model,
                                   .workspace = workspace,
                                   .comm = comm,
                                   .optimizer = optimizer,
                                   .micro_batch_count = micro_batch_count};
    int64_t rows = workspace->batch * workspace->sequence_length;
    struct schedule_options options = {workspace->block_count, micro_batch_count, workspace->options.recompute};
    enum status status = schedule_build(&runner->schedule, options);
    if (status == STATUS_OK)
        status = memory_alloc(&runner->host_ids, (size_t)rows, sizeof *runner->host_ids);
    if (status == STATUS_OK)
        status = arena_init(&runner->arena, model->device, sizeof(double) * 8);
    if (status != STATUS_OK) {
        step_runner_release(runner);
        return status;
    }
    runner->gradient_square_sum = layer_take(&runner->arena, DTYPE_F64, 1, 1);
    return STATUS_OK;
}

void step_runner_release(struct step_runner *runner) {
    schedule_release(&runner->schedule);
    free(runner->host_ids);
    arena_release(&runner->arena);
    *runner = (struct step_runner){0};
}

static void load_column(struct step_runner *runner, const int32_t *tokens, int shift, struct tensor to) {
    int64_t batch = runner->workspace->batch, length = runner->workspace->sequence_length;
    for (int64_t b = 0; b < batch; b++)
        for (int64_t t = 0; t < length; t++)
            runner->host_ids[b * length + t] = tokens[b * (length + 1) + t + shift];
    runner->model->device->copy_from_host(to.data, runner->host_ids, tensor_bytes(to));
}

static void run_load(struct step_runner *runner, const struct step_state *state, int micro_batch) {
    struct workspace *w = runner->workspace;
    const int32_t *tokens = state->input.tokens + (int64_t)micro_batch * w->batch * (w->sequence_length + 1);
    load_column(runner, tokens, 0, w->ids);
    load_column(runner, tokens, 1, w->targets);
}

static void run_clear(struct step_runner *runner) {
    runner->model->context.ops->fill(runner->model->all_gradients, 0);
    model_clear_sums(runner->model, runner->workspace);
}

static double read_sum(const struct step_runner *runner, struct tensor sum) {
    double value;
    runner->model->device->copy_to_host(&value, sum.data, sizeof value);
    return value;
}

static void run_gradient_norm(struct step_runner *runner, struct step_state *state) {
    const struct kernel_ops *ops = runner->model->context.ops;
    ops->fill(runner->gradient_square_sum, 0);
    ops->sum_squares(runner->model->all_gradients, runner->gradient_square_sum);
    state->result.gradient_norm = sqrt(read_sum(runner, runner->gradient_square_sum));
    state->result.loss = read_sum(runner, runner->workspace->loss_sum) * state->scales.token;
    state->result.skipped = !isfinite(state->result.gradient_norm) || !isfinite(state->result.loss);
    state->result.lr = optimizer_lr(runner->optimizer, state->input.step, state->input.step_count);
}

static void run_optimizer(struct step_runner *runner, const struct step_state *state, int block) {
    struct model *model = runner->model;
    for (int i = 0; i < model->table.count && !state->result.skipped; i++) {
        const struct parameter *row = &model->table.rows[i];
        if (row->block != block)
            continue;
        struct adamw_settings settings = optimizer_update_settings(
            runner->optimizer, state->input.step, state->input.step_count, state->result.gradient_norm,
            row->is_matrix);
        model->context.ops->adamw(model->weight[i], model->gradient[i], model->moment1[i], model->moment2[i],
                                  settings, model->packed[i]);
    }
}

static int64_t row_count(const struct workspace *w) {
    return w->batch * w->sequence_length;
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
    case EVENT_GATHER: /* every parameter is whole on every rank that this program knows yet */
        return STATUS_OK;
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
        block_experts_forward(m, w, event->block);
        return STATUS_OK;
    case EVENT_EXCHANGE_BACK:
        return block_combine(m, w, event->block);
    case EVENT_HEAD:
        model_head(m, w, state->scales.token, true);
        return STATUS_OK;
    case EVENT_RECOMPUTE:
        return block_recompute(m, w, event->block);
    case EVENT_EXCHANGE_BACK_GRAD:
        return block_combine_backward(m, w, event->block);
    case EVENT_EXPERTS_GRAD:
        block_experts_backward(m, w, event->block);
        return STATUS_OK;
    case EVENT_EXCHANGE_GRAD:
        return block_dispatch_backward(m, w, event->block);
    case EVENT_ROUTE_GRAD:
        state->scales = model_loss_scales(m, row_count(w) * runner->micro_batch_count,
                                          row_count(w) * (event->micro_batch + 1));
        block_route_backward(m, w, event->block, state->scales.router);
        return STATUS_OK;
    case EVENT_ATTENTION_GRAD:
        block_attention_backward(m, w, event->block);
        return STATUS_OK;
    case EVENT_EMBED_GRAD:
        model_embed_backward(m, w);
        return STATUS_OK;
    case EVENT_REDUCE: /* and so is every gradient */
        return STATUS_OK;
    case EVENT_GRADIENT_NORM:
        run_gradient_norm(runner, state);
        return STATUS_OK;
    case EVENT_OPTIMIZER:
        run_optimizer(runner, state, event->block);
        return STATUS_OK;
    case EVENT_KIND_COUNT:
        break;
    }
    CHECK(!"an event that does not exist");
    return STATUS_OK;
}

enum status step_run(struct step_runner *runner, struct step_input input, struct step_result *result) {
    struct workspace *w = runner->workspace;
    workspace_shape(w, runner->model, w->options.batch, w->options.sequence_length);
    struct step_state state = {.input = input};
    state.scales = model_loss_scales(runner->model, row_count(w) * runner->micro_batch_count, 0);
    for (int i = 0; i < runner->schedule.count; i++) {
        const struct event *event = &runner->schedule.events[i];
        for (int k = 0; k < event->wait_count; k++) /* in order of the list all that it waits for is done */
            CHECK_OP(event->waits[k], <, i);
        double begin = runner->observer.event_done ? clock_seconds() : 0;
        TRY(run_event(runner, &state, event));
        if (runner->observer.event_done)
            runner->observer.event_done(runner->observer.context, event, clock_seconds() - begin);
    }
    *result = state.result;
    return STATUS_OK;
}
