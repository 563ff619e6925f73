#include "train/trainer.h"

#include "parallel/cost.h"
#include "parallel/layout_choice.h"
#include "train/placement.h"
#include "train/shares.h"
#include <stdio.h>

enum { LINE_BYTES = 64 };

struct plan {
    const struct run_config *config;
    struct sharding sharding;
    struct model *model;
    struct traffic *traffic;
    struct schedule schedule;
    struct workspace_options workspace;
    struct workspace_memory memory;
    struct event_sending sending;
    bool on_host;                   /* tensors are in the processor's memory */
    struct outer_options outer;     /* plan.sync_steps 0: none */
    double outer_bytes;             /* of memory */
    double share_bytes, copy_bytes; /* of a checkpoint, that rank 0 writes; of its copy */
};

static enum status plan_open(struct plan *p, const struct run_config *c, int rank_count) {
    struct run_backend backend;
    p->config = c;
    TRY(run_config_planned_backend(c, &backend));
    p->on_host = backend.device == device_cpu();
    int sharers = p->on_host ? rank_count : 1; /* all on this machine, or each with a device of its own */
    struct placement_world world = {.rank_count = rank_count,
                                    .rank_memory_bytes = placement_rank_bytes(backend.device, sharers)};
    TRY(placement_choose(c, world, &p->sharding));
    struct model_options options = {backend.ops, backend.device, run_config_compute(c), DTYPE_F32, c->train.sequence_length,
                                    true,        p->sharding};
    TRY(model_create_shapes(&c->model, options, &p->model));
    TRY(traffic_create(p->model, NULL, c->layout.grad_wire == GRADIENT_WIRE_BF16 ? DTYPE_BF16 : DTYPE_F32,
                       &p->traffic));
    p->outer = run_config_outer(c);
    struct step_settings settings = {.micro_batch_count = (int)(c->train.batch_sequences / c->train.micro_batch_sequences),
                                     .micro_batch_sequences = c->train.micro_batch_sequences / c->diloco.replicas,
                                     .fragment_count = p->outer.plan.fragment_count};
    bool recompute = c->train.recompute == RECOMPUTE_BLOCK;
    TRY(schedule_build(&p->schedule, step_schedule_options(p->model, p->traffic, &settings, recompute)));
    p->workspace = (struct workspace_options){step_sequences_most(&p->sharding.mesh, settings.micro_batch_sequences),
                                              c->train.sequence_length, true, recompute};
    const struct expert_exchange_ops *exchange = p->sharding.mesh.size[MESH_EXPERT] > 1 ? expert_parallel_ops() : NULL;
    TRY(workspace_plan(p->model, p->workspace, exchange, &p->memory));
    int64_t sequences = range_count(step_sequences(&p->sharding.mesh, settings.micro_batch_sequences));
    p->sending = (struct event_sending){p->model, p->traffic, sequences * c->train.sequence_length};
    p->outer_bytes = p->outer.plan.sync_steps > 0 ? (double)outer_memory_bytes(p->model, &p->outer) : 0;
    return STATUS_OK;
}

/* The part of a checkpoint that rank 0 writes. What islands hold besides has the shapes of what each of them owns. */
static enum status plan_saving(struct plan *p) {
    struct shares shares;
    const struct outer shapes = {.global = p->model->own_weight, .momentum = p->model->own_weight};
    const struct outer *outer = p->outer.plan.sync_steps > 0 ? &shapes : NULL;
    bool rounded = p->config->checkpoint.weights == CHECKPOINT_WEIGHTS_BF16;
    enum status status = shares_init(&shares, p->model, outer, rounded, (uint64_t)p->config->checkpoint.file_bytes);
    p->share_bytes = (double)shares.bytes;
    p->copy_bytes = p->config->checkpoint.mode == CHECKPOINT_MODE_ASYNC ? p->share_bytes : 0;
    shares_release(&shares);
    return status;
}

static void plan_close(struct plan *p) {
    schedule_release(&p->schedule);
    traffic_destroy(p->traffic);
    model_destroy(p->model);
}

/* "[S0 R S1]": for replicate, shard and expert, Replicate or Shard(dim). */
static char *print_layout(const struct layout *layout, char line[LINE_BYTES]) {
    int used = snprintf(line, LINE_BYTES, "[");
    for (int axis = MESH_REPLICATE; axis < MESH_AXIS_COUNT; axis++) {
        struct placement placement = layout->axis[axis];
        used += snprintf(line + used, LINE_BYTES - (size_t)used, axis > MESH_REPLICATE ? " " : "");
        if (placement.kind == PLACEMENT_SHARD)
            used += snprintf(line + used, LINE_BYTES - (size_t)used, "S%d", placement.dim);
        else
            used += snprintf(line + used, LINE_BYTES - (size_t)used, "R");
    }
    snprintf(line + used, LINE_BYTES - (size_t)used, "]");
    return line;
}

static char *print_shape(int dim_count, const int64_t *shape, char line[LINE_BYTES]) {
    int used = 0;
    for (int dim = 0; dim < dim_count; dim++)
        used += snprintf(line + used, LINE_BYTES - (size_t)used, "%s%lld", dim ? "," : "[", (long long)shape[dim]);
    snprintf(line + used, LINE_BYTES - (size_t)used, "]");
    return line;
}

static void print_parameters(const struct plan *p, struct text *out) {
    text_add_string(
        out, "\nparameters: layouts over [replicate shard expert], S0 is divided by dimension 0, R replicated\n");
    text_printf(out, "  %-48s %-15s  %-23s %s\n", "name", "shape", "owned by rank 0", "computed with");
    for (int i = 0; i < p->model->table.count; i++) {
        const struct parameter *row = &p->model->table.rows[i];
        struct layout own = sharding_own_layout(&p->sharding, row), compute = sharding_compute_layout(row);
        char whole[LINE_BYTES], mine[LINE_BYTES], here[LINE_BYTES], own_line[LINE_BYTES], compute_line[LINE_BYTES];
        text_printf(out, "  %-48s %-15s  %s %-13s  %s %s\n", row->name, print_shape(row->dim_count, row->shape, whole),
                    print_layout(&own, own_line), print_shape(row->dim_count, p->model->own_weight[i].shape, mine),
                    print_layout(&compute, compute_line), print_shape(row->dim_count, p->model->weight[i].shape, here));
    }
}

static void write_bytes(const void *context, const struct event *event, struct text *out) {
    char line[LINE_BYTES];
    double bytes = event_sent_bytes(event, context);
    if (bytes > 0)
        text_printf(out, "%s%9s  ", event_is_exchange(event->kind) ? "~" : " ", text_bytes(line, bytes));
    else
        text_printf(out, "%12s", "");
}

static void print_schedule(const struct plan *p, struct text *out) {
    double sum = 0;
    char line[LINE_BYTES];
    struct schedule_remarks remarks = {write_bytes, &p->sending};
    bool alone = mesh_rank_count(&p->sharding.mesh) == 1;
    for (int i = 0; i < p->schedule.count; i++)
        sum += event_sent_bytes(&p->schedule.events[i], &p->sending);
    text_printf(out, "\nschedule of a step: %d events", p->schedule.count);
    if (!alone)
        text_printf(out, "; bytes that rank 0 sends, ~ with even routing: %s in all", text_bytes(line, sum));
    text_add_string(out, "\n");
    schedule_print(&p->schedule, alone ? NULL : &remarks, out);
}

/* What goes out in one round, fragment by fragment, and in which steps. */
static void print_meetings(const struct plan *p, struct text *out) {
    const struct outer_plan *plan = &p->outer.plan;
    char line[LINE_BYTES];
    if (plan->sync_steps == 0)
        return;
    text_printf(out,
                "\nmeetings of %d island%s: every %lld steps each of %d fragment%s, %s, applied %lld step%s after it "
                "was sent\n",
                p->sharding.mesh.size[MESH_ISLAND], p->sharding.mesh.size[MESH_ISLAND] > 1 ? "s" : "",
                (long long)plan->sync_steps, plan->fragment_count, plan->fragment_count > 1 ? "s" : "",
                outer_format_name(p->outer.wire), (long long)plan->overlap_steps, plan->overlap_steps == 1 ? "" : "s");
    for (int fragment = 0; fragment < plan->fragment_count; fragment++) {
        int64_t step = outer_plan_step(plan, fragment, 1);
        text_printf(out, "  fragment %-3d sent after step %lld, %lld, ...; rank 0 sends %s, its island %s\n", fragment,
                    (long long)step, (long long)(step + plan->sync_steps),
                    text_bytes(line, (double)outer_rank_bytes(p->model, &p->outer, step)),
                    text_bytes((char[LINE_BYTES]){0}, (double)outer_island_bytes(p->model, &p->outer, step)));
    }
}

static void print_line(struct text *out, const char *name, double bytes, const char *remark) {
    char line[LINE_BYTES];
    if (bytes > 0)
        text_printf(out, "  %-14s %12s   %s\n", name, text_bytes(line, bytes), remark);
}

static void print_memory(const struct plan *p, struct text *out) {
    const struct model_memory *m = &p->model->memory;
    double staging = (double)traffic_staging_bytes(p->traffic);
    double of_host = p->on_host ? p->copy_bytes + TRAIN_PROCESS_BYTES : 0;
    text_add_string(out, p->on_host ? "\nmemory of rank 0\n" : "\nmemory of rank 0, on its device\n");
    print_line(out, "weights", (double)m->weights, "fp32");
    print_line(out, "packed", (double)m->packed, "as the products read the weights");
    print_line(out, "gradients", (double)m->gradients, "fp32");
    print_line(out, "optimizer", (double)m->moments, "AdamW's two moments, fp32");
    print_line(out, "working", (double)m->working, "weights and gradients of two blocks while they are whole");
    print_line(out, "staging", staging, "what is under way between ranks");
    print_line(out, "activations", (double)p->memory.activations, "");
    print_line(out, "scratch", (double)p->memory.scratch, "");
    print_line(out, "outer", p->outer_bytes,
               "weights that islands share, their momentum, and what is under way to them");
    if (p->on_host) {
        print_line(out, "saving", p->copy_bytes, "a copy to write checkpoints from while training goes on");
        print_line(out, "process", TRAIN_PROCESS_BYTES, "libraries, generated code, working memory of the kernels");
    }
    print_line(out, "total", (double)m->total + staging + (double)p->memory.total + p->outer_bytes + of_host,
               p->sharding.mesh.size[MESH_EXPERT] > 1 ? "and the rows that routing sends here" : "");
}

enum status train_dry_run(struct run_config *config, int rank_count, struct text *out) {
    struct plan plan = {0};
    char line[LAYOUT_LINE_BYTES];
    if (config->model.vocab_size == 0)
        config->model.vocab_size = config->data.vocab_size;
    enum status status = plan_open(&plan, config, rank_count);
    if (status == STATUS_OK)
        status = plan_saving(&plan);
    if (status == STATUS_OK) {
        text_printf(out, "mesh: %s\n", layout_describe(&plan.sharding, line));
        print_parameters(&plan, out);
        print_schedule(&plan, out);
        print_meetings(&plan, out);
        print_memory(&plan, out);
        text_printf(out, "\ncheckpoint: rank 0 writes %s of it\n", text_bytes(line, plan.share_bytes));
    }
    plan_close(&plan);
    return status;
}
