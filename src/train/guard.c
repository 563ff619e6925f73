#include "train/guard.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static const double LOSS_RISE_MADS = 6, LOSS_RISE_NATS = 0.1, LOSS_RISE_SHARE = 0.05, NORM_RISE_FACTOR = 10;

static int compare_numbers(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Sorts the values. Requires count >= 1. */
static double median_of(double *values, int count) {
    qsort(values, (size_t)count, sizeof *values, compare_numbers);
    double high = values[count / 2];
    return count % 2 ? high : values[count / 2 - 1] / 2 + high / 2; /* whose sum may overflow */
}

static double loss_limit(const struct guard *guard) {
    double values[GUARD_HISTORY];
    memcpy(values, guard->loss, sizeof values);
    double median = median_of(values, guard->count);
    for (int i = 0; i < guard->count; i++)
        values[i] = fabs(guard->loss[i] - median);
    double rise = LOSS_RISE_MADS * median_of(values, guard->count);
    return median + fmax(rise, fmax(LOSS_RISE_NATS, LOSS_RISE_SHARE * fabs(median)));
}

static double norm_limit(const struct guard *guard) {
    double values[GUARD_HISTORY];
    memcpy(values, guard->gradient_norm, sizeof values);
    return NORM_RISE_FACTOR * median_of(values, guard->count);
}

struct step_limits guard_limits(const struct guard *guard, struct guard_settings settings) {
    if (settings.spikes == SPIKES_IGNORE || guard->count < GUARD_HISTORY_LEAST)
        return (struct step_limits){0};
    return (struct step_limits){loss_limit(guard), norm_limit(guard)};
}

static void remember(struct guard *guard, const struct step_result *result) {
    if (guard->count == GUARD_HISTORY) {
        guard->count--;
        memmove(guard->loss, guard->loss + 1, (size_t)guard->count * sizeof *guard->loss);
        memmove(guard->gradient_norm, guard->gradient_norm + 1, (size_t)guard->count * sizeof *guard->gradient_norm);
    }
    guard->loss[guard->count] = result->loss;
    guard->gradient_norm[guard->count++] = result->gradient_norm;
}

static enum guard_verdict accept(struct guard *guard, int64_t step, const struct step_result *result) {
    CHECK(isfinite(result->loss) && isfinite(result->gradient_norm));
    remember(guard, result);
    guard->skipped_in_a_row = 0;
    if (step >= guard->furthest_step + GUARD_HISTORY)
        guard->rollbacks = 0;
    return GUARD_GO_ON;
}

enum guard_verdict guard_note(struct guard *guard, struct guard_settings settings, int64_t step,
                              const struct step_result *result) {
    if (result->skipped == STEP_UPDATED)
        return accept(guard, step, result);
    bool is_spike = result->skipped == STEP_LOSS_SPIKE || result->skipped == STEP_GRADIENT_SPIKE;
    guard->skipped_in_a_row++;
    if (guard->skipped_in_a_row < GUARD_SKIPPED_MAX && !(is_spike && settings.spikes == SPIKES_ROLL_BACK))
        return GUARD_GO_ON;
    return guard->rollbacks < settings.rollback_limit ? GUARD_ROLL_BACK : GUARD_GIVE_UP;
}

void guard_roll_back(struct guard *guard, const struct guard *before, int64_t step) {
    guard->skipped_in_a_row = 0;
    guard->rollbacks = before->rollbacks + 1;
    guard->furthest_step = step > before->furthest_step ? step : before->furthest_step;
}

/* ---- in a file --------------------------------------------------------------------------------------------------- */

static json_t *pack_numbers(const double *numbers, int count) {
    json_t *list = json_array();
    for (int i = 0; i < count; i++)
        json_array_append_new(list, json_real(numbers[i]));
    return list;
}

json_t *guard_pack(const struct guard *guard) {
    return json_pack("{s:o,s:o,s:I,s:I,s:I}", "losses", pack_numbers(guard->loss, guard->count), "gradient_norms",
                     pack_numbers(guard->gradient_norm, guard->count), "skipped_in_a_row",
                     (json_int_t)guard->skipped_in_a_row, "rollbacks", (json_int_t)guard->rollbacks, "furthest_step",
                     (json_int_t)guard->furthest_step);
}

static enum status unpack_numbers(struct json_source source, const char *key, double numbers[GUARD_HISTORY],
                                  int *count) {
    const json_t *list = json_object_get(source.object, key);
    if (!json_is_array(list) || json_array_size(list) > GUARD_HISTORY)
        return status_fail(STATUS_FORMAT, "%s: %s is not a list of at most %d numbers", source.label, key,
                           GUARD_HISTORY);
    *count = (int)json_array_size(list);
    for (int i = 0; i < *count; i++) {
        const json_t *number = json_array_get(list, (size_t)i);
        numbers[i] = json_number_value(number);
        if (!json_is_number(number) || !isfinite(numbers[i]))
            return status_fail(STATUS_FORMAT, "%s: %s[%d] is not a number", source.label, key, i);
    }
    return STATUS_OK;
}

enum status guard_unpack(struct json_source source, struct guard *guard) {
    int norm_count;
    *guard = (struct guard){0};
    if (!source.object)
        return STATUS_OK;
    TRY(unpack_numbers(source, "losses", guard->loss, &guard->count));
    TRY(unpack_numbers(source, "gradient_norms", guard->gradient_norm, &norm_count));
    if (norm_count != guard->count)
        return status_fail(STATUS_FORMAT, "%s: %d losses and %d gradient_norms are not those of the same steps",
                           source.label, guard->count, norm_count);
    TRY(json_get_integer(source, "skipped_in_a_row", true, 0, INT64_MAX, &guard->skipped_in_a_row));
    TRY(json_get_integer(source, "rollbacks", true, 0, INT64_MAX, &guard->rollbacks));
    return json_get_integer(source, "furthest_step", true, 0, INT64_MAX - GUARD_HISTORY, &guard->furthest_step);
}
