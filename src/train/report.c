#include "train/report.h"

#include "base/clock.h"
#include "base/log.h"
#include "base/memory.h"
#include "train/evaluate.h"
#include "train/run_directory.h"
#include <math.h>
#include <stdlib.h>

enum status train_report_open(struct train_report *report, const struct run_config *config, const struct model *model,
                              int64_t first_step, double roof_operations_per_s) {
    *report = (struct train_report){.config = config, .model = model, .roof_operations_per_s = roof_operations_per_s};
    char *metrics = run_directory_path(config, "metrics.jsonl"), *board = run_directory_path(config, "tensorboard");
    enum status status = metrics_file_open(&report->metrics, metrics, first_step);
    if (status == STATUS_OK)
        status = tensorboard_open(&report->tensorboard, board, clock_wall_seconds());
    free(metrics);
    free(board);
    return status;
}

void train_report_close(struct train_report *report) {
    log_progress_end();
    metrics_file_close(&report->metrics);
    tensorboard_close(&report->tensorboard);
}

/* What the blocks' routers did in a step. */
struct health_summary {
    struct router_health *blocks; /* [L]; NULL in a dense model */
    double worst_load, balance_loss, z_loss;
    int dead_experts;
};

static enum status read_health(const struct train_report *report, const struct workspace *workspace,
                               struct health_summary *summary) {
    const struct model_config *c = &report->config->model;
    *summary = (struct health_summary){0};
    if (!tensor_exists(workspace->all_stats))
        return STATUS_OK;
    int64_t stat_count = 2 + 2 * c->num_experts;
    int64_t island_sequences = report->config->train.batch_sequences / report->config->diloco.replicas;
    int64_t tokens = island_sequences * report->config->train.sequence_length;
    double *stats;
    TRY(memory_alloc(&stats, (size_t)(c->num_hidden_layers * stat_count), sizeof *stats));
    report->model->device->copy_to_host(stats, workspace->all_stats.data, tensor_bytes(workspace->all_stats));
    enum status status = memory_alloc(&summary->blocks, (size_t)c->num_hidden_layers, sizeof *summary->blocks);
    for (int64_t l = 0; l < c->num_hidden_layers && status == STATUS_OK; l++) {
        struct router_health health =
            router_health_from_stats(stats + l * stat_count, c->num_experts, c->num_experts_per_tok, tokens);
        summary->blocks[l] = health;
        summary->worst_load = fmax(summary->worst_load, health.load_max_over_mean);
        summary->dead_experts += health.dead_experts;
        summary->balance_loss += health.balance_loss / (double)c->num_hidden_layers;
        summary->z_loss += health.z_loss / (double)c->num_hidden_layers;
    }
    free(stats);
    return status;
}

static void add_health(json_t *object, const struct train_report *report, const struct health_summary *summary) {
    json_t *loads = json_array(), *entropies = json_array(), *dead = json_array();
    for (int64_t l = 0; l < report->config->model.num_hidden_layers; l++) {
        json_array_append_new(loads, metrics_number(summary->blocks[l].load_max_over_mean));
        json_array_append_new(entropies, metrics_number(summary->blocks[l].entropy));
        json_array_append_new(dead, json_integer(summary->blocks[l].dead_experts));
    }
    json_object_set_new(object, "load_max_over_mean", loads);
    json_object_set_new(object, "entropy", entropies);
    json_object_set_new(object, "dead_experts", dead);
    json_object_set_new(object, "aux_loss", metrics_number(summary->balance_loss));
    json_object_set_new(object, "z_loss", metrics_number(summary->z_loss));
}

struct step_figures {
    double tokens_per_s, roof_share, seconds;
};

static enum status write_metrics(struct train_report *report, const struct train_state *state,
                                 const struct step_result *result, const struct step_figures *figures,
                                 const struct health_summary *health) {
    json_t *object = json_object();
    json_object_set_new(object, "step", json_integer(state->step));
    json_object_set_new(object, "tokens", json_integer(state->tokens));
    json_object_set_new(object, "loss", metrics_number(result->loss));
    json_object_set_new(object, "lr", metrics_number(result->lr));
    json_object_set_new(object, "grad_norm", metrics_number(result->gradient_norm));
    if (result->skipped) {
        json_object_set_new(object, "skipped", json_true());
        json_object_set_new(object, "reason", json_string(step_skip_reason(result->skipped)));
    }
    json_object_set_new(object, "step_time_ms", metrics_number(1e3 * figures->seconds));
    json_object_set_new(object, "tokens_per_s", metrics_number(figures->tokens_per_s));
    json_object_set_new(object, "flops_share", metrics_number(figures->roof_share));
    if (health->blocks)
        add_health(object, report, health);
    json_object_set_new(object, "comm_bytes", json_integer(result->comm_bytes));
    json_object_set_new(object, "outer_bytes", json_integer(result->outer_bytes));
    return metrics_file_add(&report->metrics, object);
}

static enum status write_board(struct train_report *report, int64_t step, const struct step_result *result,
                               const struct step_figures *figures, const struct health_summary *health) {
    double now = clock_wall_seconds();
    struct tensorboard *board = &report->tensorboard;
    TRY(tensorboard_add(board, "loss", result->loss, step, now));
    TRY(tensorboard_add(board, "lr", result->lr, step, now));
    TRY(tensorboard_add(board, "grad_norm", result->gradient_norm, step, now));
    TRY(tensorboard_add(board, "tokens_per_s", figures->tokens_per_s, step, now));
    if (!health->blocks)
        return STATUS_OK;
    TRY(tensorboard_add(board, "router/load_max_over_mean", health->worst_load, step, now));
    return tensorboard_add(board, "router/aux_loss", health->balance_loss, step, now);
}

enum status train_report_step(struct train_report *report, const struct workspace *workspace,
                              const struct train_state *state, const struct step_result *result, double seconds) {
    const struct run_config *c = report->config;
    struct health_summary health;
    TRY(read_health(report, workspace, &health));
    double tokens = (double)(c->train.batch_sequences * c->train.sequence_length);
    struct step_figures figures = {.tokens_per_s = tokens / seconds, .seconds = seconds};
    figures.roof_share = figures.tokens_per_s * model_train_operations_per_token(&c->model, c->train.sequence_length) /
                         report->roof_operations_per_s;
    enum status status = write_metrics(report, state, result, &figures, &health);
    if (status == STATUS_OK)
        status = write_board(report, state->step, result, &figures, &health);
    struct progress_step shown = {state->step,        c->train.steps,    result->loss,        figures.tokens_per_s,
                                  figures.roof_share, health.worst_load, health.dead_experts, seconds};
    progress_show(&report->progress, &shown);
    free(health.blocks);
    return status;
}

enum status train_report_outer(struct train_report *report, int64_t step, const struct outer_report *outer) {
    double now = clock_wall_seconds();
    json_t *object = json_pack("{s:I,s:s,s:i,s:I}", "step", (json_int_t)step, "event", "outer", "fragment",
                               outer->fragment, "sent_step", (json_int_t)outer->sent_step);
    json_object_set_new(object, "outer_grad_norm", metrics_number(outer->gradient_norm));
    json_object_set_new(object, "cosine", metrics_number(outer->cosine));
    json_object_set_new(object, "flushed", metrics_number(outer->flushed));
    json_object_set_new(object, "outer_bytes", json_integer(outer->sent_bytes));
    json_object_set_new(object, "waited_ms", metrics_number(1e3 * outer->waited_s));
    json_object_set_new(object, "loss", metrics_number(outer->loss));
    TRY(metrics_file_add(&report->metrics, object));
    TRY(tensorboard_add(&report->tensorboard, "outer/grad_norm", outer->gradient_norm, step, now));
    return tensorboard_add(&report->tensorboard, "outer/loss", outer->loss, step, now);
}

enum status train_report_rollback(struct train_report *report, int64_t step, int64_t to_step, const char *reason) {
    return metrics_file_add(&report->metrics, json_pack("{s:I,s:s,s:I,s:s}", "step", (json_int_t)step, "event",
                                                        "rollback", "to_step", (json_int_t)to_step, "reason", reason));
}

enum status train_report_evaluation(struct train_report *report, int64_t step, double loss, double bits_per_byte) {
    double now = clock_wall_seconds();
    json_t *object = json_object();
    json_object_set_new(object, "step", json_integer(step));
    json_object_set_new(object, "valid_loss", metrics_number(loss));
    json_object_set_new(object, "valid_bits_per_byte", metrics_number(bits_per_byte));
    TRY(metrics_file_add(&report->metrics, object));
    TRY(tensorboard_add(&report->tensorboard, "valid_loss", loss, step, now));
    TRY(tensorboard_add(&report->tensorboard, "valid_bits_per_byte", bits_per_byte, step, now));
    log_info("held out at step %lld: loss %.3f, %.3f bits per byte", (long long)step, loss, bits_per_byte);
    return STATUS_OK;
}
