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
            repeats->stretches[repeats->count++] = (struct stretch){.begin = begin, .end = i};
    }
}

void repeats_release(struct repeats *repeats) {
    for (int i = 0; i < repeats->count; i++)
        device_forget(repeats->recorder, &repeats->stretches[i].work);
    *repeats = (struct repeats){0};
}

struct stretch *repeats_at(struct repeats *repeats, int event) {
    for (int i = 0; i < repeats->count; i++)
        if (repeats->stretches[i].begin == event)
            return &repeats->stretches[i];
    return NULL;
}

struct asking {
    const struct stretch *stretch;
    enum status (*ask)(void *context, const struct stretch *stretch);
    void *context;
};

static enum status ask_for(void *context) {
    const struct asking *asking = context;
    return asking->ask(asking->context, asking->stretch);
}

enum status repeats_run(struct repeats *repeats, struct stretch *stretch,
                        enum status (*ask)(void *context, const struct stretch *stretch), void *context) {
    struct asking asking = {stretch, ask, context};
    enum status status = device_repeat(repeats->recorder, &stretch->work, ask_for, &asking);
    if (stretch->work.is_refused) {
        log_verbose("the device records no graph of events %d to %d: they run one by one", stretch->begin, stretch->end - 1);
        repeats_release(repeats);
    }
    return status;
}
