/* The CUDA device, or a model of it, whose recordings are counted and made to fail. For tests. */
#pragma once

#include "device/device.h"
#include <string.h>

static struct {
    const struct device_recorder *real;
    int begun, repeated, out_of_date, released, failures; /* so many recordings more come to nothing */
} seen;

static void count_begin(void) {
    seen.begun++;
    seen.real->begin();
}

static struct recording *count_end(void) {
    struct recording *recording = seen.real->end();
    if (seen.failures == 0)
        return recording;
    seen.failures--;
    seen.real->release(recording);
    return NULL;
}

static bool count_repeat(struct recording *recording) {
    bool done = seen.real->repeat(recording);
    seen.repeated += done;
    seen.out_of_date += !done;
    return done;
}

static void count_release(struct recording *recording) {
    seen.released += recording != NULL;
    seen.real->release(recording);
}

static const struct device_recorder counting = {count_begin, count_end, count_repeat, count_release};

/* The device with recordings counted. */
static const struct device *watched(void) {
    static struct device device;
    const struct device *real;
    if (device_choose("cuda", &real) != STATUS_OK)
        return NULL;
    device = *real;
    memset(&seen, 0, sizeof seen);
    seen.real = real->recorder;
    device.recorder = &counting;
    return &device;
}
