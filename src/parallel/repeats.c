#include "parallel/repeats.h"

#include "base/log.h"

/* On one rank the events of transfers move nothing: they stand between others. */
static bool is_repeated(enum event_kind kind) {
    switch (kind) {
    case EVENT_CLEAR:
    case EVENT_LOAD:
    case EVENT_GRADIENT_NORM:
    case EVENT_OPTIMIZER:
    case EVENT_OUTER_SEND:
    case EVENT_OUTER_APPLY:
        return false;
    default:
        return true;
    }
}

void repeats_init(struct repeats *repeats, const struct schedule *schedule, const struct device *device) {
    *repeats = (struct repeats){.recorder = device->recorder};
    for (int i = 0; repeats->recorder && i < schedule->count && repeats->count < REPEATS_MAX; i++) {
        int begin = i;
        while (i < schedule->count && is_repeated(schedule->events[i].kind))
            i++;
        if (i > begin)
            repeats->stretches[repeats->count++] = (struct stretch){begin, i, NULL};
    }
}

static void forget(struct repeats *repeats, struct stretch *stretch) {
    repeats->recorder->release(stretch->recording);
    stretch->recording = NULL;
}

void repeats_release(struct repeats *repeats) {
    for (int i = 0; i < repeats->count; i++)
        forget(repeats, &repeats->stretches[i]);
    *repeats = (struct repeats){0};
}

struct stretch *repeats_at(struct repeats *repeats, int event) {
    for (int i = 0; i < repeats->count; i++)
        if (repeats->stretches[i].begin == event)
            return &repeats->stretches[i];
    return NULL;
}

enum status repeats_run(struct repeats *repeats, struct stretch *stretch,
                        enum status (*ask)(void *context, const struct stretch *stretch), void *context) {
    const struct device_recorder *recorder = repeats->recorder;
    if (stretch->recording && recorder->repeat(stretch->recording))
        return STATUS_OK;
    forget(repeats, stretch);
    if (!repeats->is_warm)
        return ask(context, stretch);
    recorder->begin();
    enum status status = ask(context, stretch);
    stretch->recording = recorder->end();
    if (status != STATUS_OK || (stretch->recording && recorder->repeat(stretch->recording)))
        return status;
    struct stretch plain = *stretch;
    log_verbose("the device records no graph of events %d to %d: they run one by one", plain.begin, plain.end - 1);
    repeats_release(repeats);
    return ask(context, &plain);
}
