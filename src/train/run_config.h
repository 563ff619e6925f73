/* Every setting of a training run: what config.ini and the command line may say. */
#pragma once

#include "device/device.h"
#include "kernels/kernels.h"
#include "model/config.h"
#include "optim/optimizer.h"
#include "parallel/outer.h"

enum precision { PRECISION_AUTO, PRECISION_FP32, PRECISION_BF16 };
enum recompute { RECOMPUTE_NONE, RECOMPUTE_BLOCK };
enum layout_zero { LAYOUT_ZERO_AUTO, LAYOUT_ZERO_0, LAYOUT_ZERO_1, LAYOUT_ZERO_2, LAYOUT_ZERO_3 };
enum gradient_wire { GRADIENT_WIRE_FP32, GRADIENT_WIRE_BF16 };

enum checkpoint_mode { CHECKPOINT_MODE_ASYNC, CHECKPOINT_MODE_SYNC };
enum checkpoint_overlap { CHECKPOINT_OVERLAP_WAIT, CHECKPOINT_OVERLAP_REPLACE };
enum checkpoint_weights { CHECKPOINT_WEIGHTS_FP32, CHECKPOINT_WEIGHTS_BF16 };

struct run_config {
    struct model_config model;
    char preset[SETTING_STRING_BYTES];
    struct {
        char train[SETTING_STRING_BYTES], valid[SETTING_STRING_BYTES], tokenizer[SETTING_STRING_BYTES];
        int64_t vocab_size;
    } data;
    struct {
        int64_t steps;
        double target_minutes;
        int64_t sequence_length, batch_sequences, micro_batch_sequences;
        int precision, recompute; /* enum precision, enum recompute */
        int64_t seed, eval_every_steps, eval_tokens, sample_every_steps;
        int spikes; /* enum guard_spikes */
        int64_t rollback_limit, verify_steps;
    } train;
    struct optimizer_settings optim;
    struct {
        int64_t replicate, shard, expert; /* ranks along an axis; 0: to be chosen */
        int zero, grad_wire;              /* enum layout_zero, enum gradient_wire */
        int64_t exchange_limit_bytes;
    } layout;
    struct {
        int64_t replicas, sync_steps; /* islands; 0: they never meet */
        int64_t fragments;            /* 0: to be chosen */
        int order;                    /* enum outer_order */
        int64_t overlap_steps;
        double mix;                   /* DILOCO_MIX_AUTO: to be chosen */
        double outer_lr, outer_momentum;
        int wire;                     /* enum outer_format */
        int64_t experts_every;
    } diloco;
    struct {
        int64_t every_steps, keep, keep_every_steps, file_bytes;
        bool at_end, keep_best;
        int mode, overlap, read; /* enum checkpoint_mode, checkpoint_overlap, checkpoint_read (train/state.h) */
        int weights;             /* enum checkpoint_weights */
    } checkpoint;
    struct {
        char directory[SETTING_STRING_BYTES], kernels[SETTING_STRING_BYTES], device[SETTING_STRING_BYTES];
        int64_t threads;
        int transport; /* enum comm_wish */
        bool graph;
        double timeout_seconds;
    } run;
};

struct setting_group run_config_group(void);

/* Defaults without a preset. */
void run_config_init(struct run_config *config);

/* Names of the presets, NULL at the end. */
const char *const *preset_names(void);

/* Set what a preset says; STATUS_USAGE with the nearest name for an unknown one. */
enum status preset_apply(struct run_config *config, const char *name) MUST_USE;

/* From a file (or NULL) and pairs "section.key", "value" of a command line: defaults, then the preset that file or line
 * name, then the file, then the line. Checks what can be checked before any data is read. */
enum status run_config_resolve(struct run_config *config, const char *ini_path, const char *const *pairs,
                               int pair_count) MUST_USE;

/* Sizes that belong together: micro-batches divide the batch, the sequence fits the positions, ... */
enum status run_config_check(struct run_config *config) MUST_USE;

enum { DILOCO_MIX_AUTO = -1 };

/* What [diloco] says, with what was left to be chosen; plan.sync_steps is 0 where there is none. */
struct outer_options run_config_outer(const struct run_config *config);

/* What the run computes on: the device that is named, and the kernels for it. STATUS_USAGE, in one line, where this program or
 * this machine has none of that name. */
struct run_backend {
    const struct device *device;
    const struct kernel_ops *ops;
};
enum status run_config_backend(const struct run_config *config, struct run_backend *backend) MUST_USE;

/* The same to plan with: the device need not be there (device_plan). */
enum status run_config_planned_backend(const struct run_config *config, struct run_backend *backend) MUST_USE;

/* The dtype that products run in, with PRECISION_AUTO decided for this machine and the device that is named. */
enum dtype run_config_compute(const struct run_config *config);
