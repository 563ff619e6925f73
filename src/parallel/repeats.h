/* Stretches of a step that a device repeats from a recording (device/device.h).
 *
 * What a micro-batch computes, from its tokens' arrival to the next one's, is asked for with the same addresses and numbers in
 * every step, as long as there is one rank: routing changes what lies in memory, not what is asked. So it is asked for once and
 * then repeated. Not of it: what loads tokens, and norm and optimizer, whose numbers are the step's.
 */
#pragma once

#include "device/device.h"
#include "parallel/schedule.h"

/* Events begin .. end - 1 of the schedule. */
struct stretch {
    int begin, end;
    struct repeated work;
};

/* More micro-batches than that run as they are asked for. */
enum { REPEATS_MAX = 16 };

struct repeats {
    const struct device_recorder *recorder;
    struct stretch stretches[REPEATS_MAX];
    int count;
};

/* Of a step of one rank. None where the device has no recorder. */
void repeats_init(struct repeats *repeats, const struct schedule *schedule, const struct device *device);
void repeats_release(struct repeats *repeats);

/* The stretch that begins at an event, or NULL. */
struct stretch *repeats_at(struct repeats *repeats, int event);

/* device_repeat of what the stretch's events ask for. When a device cannot record one, none is any more. */
enum status repeats_run(struct repeats *repeats, struct stretch *stretch,
                        enum status (*ask)(void *context, const struct stretch *stretch), void *context) MUST_USE;
