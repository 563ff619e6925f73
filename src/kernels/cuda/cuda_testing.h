/* What the tests share whose operands lie in the device's own memory: the device, an arena of it, operands and outputs. */
#pragma once

#include "device/device.h"
#include "kernels/kernels_testing.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <cmocka.h>

enum { GUARD_BYTES = 12288, ARENA_BYTES = 256 << 20 };

static const struct device *device; /* NULL: none here */
static const struct kernel_ops *ops;
static struct arena arena;
static int failures;

/* What is absent stays so. */
static inline struct tensor on_device(struct tensor host) {
    struct tensor t = host;
    if (!tensor_exists(host))
        return host;
    t.data = arena_take(&arena, tensor_bytes(host));
    device->copy_from_host(t.data, host.data, tensor_bytes(host));
    return t;
}

/* An output that starts from the host's numbers, which may be poison, with a guard behind it. */
static inline struct tensor output_on_device(struct tensor host) {
    struct tensor t = host;
    size_t bytes = tensor_bytes(host);
    unsigned char *guard = memory_must(GUARD_BYTES, 1);
    t.data = arena_take(&arena, bytes + GUARD_BYTES);
    for (size_t i = 0; i < GUARD_BYTES; i++)
        guard[i] = test_guard_byte(i);
    device->copy_from_host(t.data, host.data, bytes);
    device->copy_from_host((char *)t.data + bytes, guard, GUARD_BYTES);
    free(guard);
    return t;
}

static inline bool output_guard_holds(struct tensor t) {
    bool holds = true;
    unsigned char *guard = memory_must(GUARD_BYTES, 1);
    device->copy_to_host(guard, (char *)t.data + tensor_bytes(t), GUARD_BYTES);
    for (size_t i = 0; i < GUARD_BYTES; i++)
        holds = holds && guard[i] == test_guard_byte(i);
    free(guard);
    return holds;
}

static inline int find_device(void **state) {
    (void)state;
    if (device_choose("cuda", &device) != STATUS_OK) {
        printf("not exercised here: %s\n", status_text());
        device = NULL;
        return 0;
    }
    const char *name = getenv("CADRE_TEST_KERNELS"); /* of CUDA_KERNEL_NAMES */
    printf("on %s\n", device_describe(device));
    if (kernels_choose_for(device, name ? name : "auto", &ops) != STATUS_OK)
        return -1;
    return arena_init(&arena, device, ARENA_BYTES) == STATUS_OK ? 0 : -1;
}

/* Of a model: kernels with `kernel` in their names ran where CADRE_TEST_KERNELS has `word`, and only there; where it has not, if
 * `has` is false. Results do not show it: who falls back on other kernels has the same ones. */
static inline void expect_kernels(const char *kernel, const char *word, bool has) {
#ifdef CADRE_CUDA_MODEL
    const char *name = getenv("CADRE_TEST_KERNELS");
    bool is_asked = (name && strstr(name, word) != NULL) == has;
    if (cuda_model_ran(kernel) != is_asked)
        fail_msg("CADRE_TEST_KERNELS=%s: %s ran: %d", name ? name : "", kernel, !is_asked);
#else
    (void)kernel, (void)word, (void)has;
#endif
}

static inline int leave_device(void **state) {
    (void)state;
    arena_release(&arena);
    return 0;
}
