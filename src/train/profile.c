#include "train/profile.h"

#include "base/clock.h"
#include "base/file.h"
#include "base/memory.h"
#include <stdlib.h>

static const char *span_name(enum profile_span span) {
    static const char *const names[SPAN_COUNT] = {"step", "data", "report", "evaluation", "sample", "checkpoint"};
    CHECK(span < SPAN_COUNT);
    return names[span];
}

/* ---- noting ------------------------------------------------------------------------------------------------------ */

static void add_record(struct profile *p, struct profile_record record) {
    if (!p->records)
        return;
    record.step = p->step;
    p->records[p->record_count++ % p->record_capacity] = record;
}

static void add_total(struct profile_total *total, double seconds) {
    total->calls++;
    total->seconds += seconds;
}

static void note_event(void *context, const struct event *event, double seconds) {
    struct profile *p = context;
    add_total(&p->events[event->kind], seconds);
    add_record(p, (struct profile_record){.name = event_kind_name(event->kind),
                                          .block = event->block,
                                          .micro_batch = event->micro_batch,
                                          .begin = clock_seconds() - seconds,
                                          .seconds = seconds});
}

enum status profile_init(struct profile *p, struct step_runner *runner, bool with_trace) {
    *p = (struct profile){0};
    const struct schedule *schedule = &runner->schedule;
    if (with_trace) {
        p->record_capacity = PROFILE_TRACE_STEPS * ((size_t)schedule->count + SPAN_COUNT);
        TRY(memory_alloc(&p->records, p->record_capacity, sizeof *p->records));
    }
    for (int i = 0; i < schedule->count; i++) {
        struct event_cost cost = event_cost(&schedule->events[i], runner->model, runner->workspace);
        p->step_costs[schedule->events[i].kind].operations += cost.operations;
        p->step_costs[schedule->events[i].kind].bytes += cost.bytes;
    }
    p->runner = runner;
    runner->observer = (struct step_observer){note_event, p};
    return STATUS_OK;
}

void profile_release(struct profile *p) {
    free(p->records);
    *p = (struct profile){0};
}

void profile_begin_step(struct profile *p, int64_t step) {
    p->step = step;
}

void profile_note(struct profile *p, enum profile_span span, double begin) {
    if (!p->runner)
        return;
    double seconds = clock_seconds() - begin;
    add_total(&p->spans[span], seconds);
    add_record(p, (struct profile_record){span_name(span), -1, -1, 0, begin, seconds});
}

/* ---- the table --------------------------------------------------------------------------------------------------- */

/* Rates stand beside the roof that bounds them: operations where there are any, else bytes. */
static void print_rate(struct text *out, struct event_cost cost, double seconds, struct profile_roof roof) {
    if (cost.operations > 0)
        text_printf(out, "  %8.1f GFLOP/s  %6.1f%%", 1e-9 * cost.operations / seconds,
                    100 * cost.operations / seconds / roof.operations_per_s);
    else if (cost.bytes > 0)
        text_printf(out, "  %8.1f GB/s     %6.1f%%", 1e-9 * cost.bytes / seconds,
                    100 * cost.bytes / seconds / roof.bytes_per_s);
    else
        text_printf(out, "  %8s          %7s", "-", "-");
}

static void print_row(const struct profile *p, const char *name, struct profile_total total, struct event_cost cost,
                      struct profile_roof roof, struct text *out) {
    if (total.calls == 0)
        return;
    const struct profile_total *step = &p->spans[SPAN_STEP];
    double seconds = total.seconds / (double)step->calls;
    text_printf(out, "%-18s %10.4g  %9.2f  %5.1f%%", name, (double)total.calls / (double)step->calls, 1e3 * seconds,
                100 * total.seconds / step->seconds);
    print_rate(out, cost, seconds, roof);
    text_add_string(out, "\n");
}

void profile_print(const struct profile *p, struct profile_roof roof, struct text *out) {
    const struct event_cost nothing = {0};
    struct event_cost whole = {0};
    if (p->spans[SPAN_STEP].calls == 0)
        return;
    text_printf(out, "%-18s %10s  %9s  %6s  %16s  %7s\n", "event", "calls/step", "ms/step", "share", "rate    ",
                "of roof");
    print_row(p, span_name(SPAN_DATA), p->spans[SPAN_DATA], nothing, roof, out);
    for (int kind = 0; kind < EVENT_KIND_COUNT; kind++) {
        print_row(p, event_kind_name((enum event_kind)kind), p->events[kind], p->step_costs[kind], roof, out);
        whole.operations += kind == EVENT_RECOMPUTE ? 0 : p->step_costs[kind].operations;
    }
    print_row(p, span_name(SPAN_STEP), p->spans[SPAN_STEP], whole, roof, out);
    for (int span = SPAN_REPORT; span < SPAN_COUNT; span++)
        print_row(p, span_name((enum profile_span)span), p->spans[span], nothing, roof, out);
}

/* ---- the trace --------------------------------------------------------------------------------------------------- */

static void print_record(const struct profile_record *record, double origin, struct text *out) {
    text_printf(out, "{\"name\":\"%s\",\"ph\":\"X\",\"ts\":%.3f,\"dur\":%.3f,\"pid\":1,\"tid\":1,", record->name,
                1e6 * (record->begin - origin), 1e6 * record->seconds);
    text_printf(out, "\"args\":{\"step\":%lld", (long long)record->step);
    if (record->block >= 0)
        text_printf(out, ",\"block\":%d", record->block);
    if (record->micro_batch >= 0)
        text_printf(out, ",\"micro_batch\":%d", record->micro_batch);
    text_add_string(out, "}}");
}

enum status profile_write_trace(const struct profile *p, const char *path) {
    CHECK(p->records != NULL);
    struct text out = {0};
    size_t first = p->record_count > p->record_capacity ? p->record_count - p->record_capacity : 0;
    double origin = 0;
    bool any = false;
    text_add_string(&out, "{\"displayTimeUnit\":\"ms\",\"traceEvents\":[");
    for (size_t i = first; i < p->record_count; i++) {
        const struct profile_record *record = &p->records[i % p->record_capacity];
        if (record->step <= p->step - PROFILE_TRACE_STEPS)
            continue;
        origin = any ? origin : record->begin;
        text_add_string(&out, any ? ",\n" : "\n");
        print_record(record, origin, &out);
        any = true;
    }
    text_add_string(&out, "\n]}\n");
    enum status status = file_write(path, out.data, out.size);
    text_release(&out);
    return status;
}
