/* A small model on a device whose recordings are counted. For tests. */
#pragma once

#include "device/recorder_testing.h"
#include "model/model.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

enum { VOCAB = 67 };

static inline struct model *small_model(const struct device *device, enum dtype compute, int64_t experts, int64_t positions,
                                        bool training, uint64_t seed) {
    struct model_config c;
    struct model *model;
    const struct device *real;
    const struct kernel_ops *ops;
    model_config_init(&c);
    c.vocab_size = VOCAB;
    c.hidden_size = 32;
    c.num_hidden_layers = 2;
    c.num_attention_heads = 4;
    c.num_key_value_heads = 2;
    c.num_experts = experts;
    c.intermediate_size = 48;
    c.moe_intermediate_size = 24;
    c.initializer_range = 0.2;
    assert_int_equal(model_config_check(&c, "test"), STATUS_OK);
    assert_int_equal(device_choose(device->name, &real), STATUS_OK);
    assert_int_equal(kernels_choose_for(real, "auto", &ops), STATUS_OK);
    struct model_options options = {ops, device, compute, DTYPE_F32, positions, training, sharding_single()};
    assert_int_equal(model_create(&c, options, &model), STATUS_OK);
    assert_int_equal(model_initialize(model, seed), STATUS_OK);
    return model;
}
