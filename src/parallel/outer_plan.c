#include "parallel/outer_plan.h"

#include "model/parameter.h"

enum { BLOCKS_PER_FRAGMENT = 3 };

static int64_t least_distance(int64_t sync_steps, int fragment_count) {
    return sync_steps / fragment_count;
}

enum status outer_plan_check(const struct outer_plan *plan) {
    int64_t distance = least_distance(plan->sync_steps, plan->fragment_count);
    if (plan->fragment_count - 1 > plan->block_count)
        return status_fail(
            STATUS_USAGE,
            "diloco.fragments %d: the model has %d blocks, and what is outside of them is a fragment of its "
            "own; at most %d",
            plan->fragment_count, plan->block_count, plan->block_count + 1);
    if (distance < 1)
        return status_fail(
            STATUS_USAGE,
            "diloco.fragments %d cannot be sent within diloco.sync_steps %lld: at most one a step, so at most "
            "%lld fragments",
            plan->fragment_count, (long long)plan->sync_steps, (long long)plan->sync_steps);
    if (plan->overlap_steps > 0 && plan->overlap_steps >= distance)
        return status_fail(
            STATUS_USAGE,
            "diloco.overlap_steps %lld: a fragment must have arrived before the next is sent, %lld steps later "
            "(diloco.sync_steps %lld / diloco.fragments %d); at most %lld, or fewer fragments",
            (long long)plan->overlap_steps, (long long)distance, (long long)plan->sync_steps, plan->fragment_count,
            (long long)distance - 1);
    return STATUS_OK;
}

int outer_plan_fragments(int block_count, int64_t sync_steps, int64_t overlap_steps) {
    int wanted = (block_count + BLOCKS_PER_FRAGMENT - 1) / BLOCKS_PER_FRAGMENT + 1;
    while (wanted > 1 && least_distance(sync_steps, wanted) <= overlap_steps)
        wanted--;
    return wanted;
}

int outer_plan_fragment_of(const struct outer_plan *plan, int group) {
    int of_blocks = plan->fragment_count - 1;
    if (of_blocks == 0)
        return 0;
    if (group < 0)
        return of_blocks;
    if (plan->order == OUTER_STRIDED)
        return group % of_blocks;
    return (int)range_owner(plan->block_count, of_blocks, group);
}

bool outer_plan_equal(const struct outer_plan *a, const struct outer_plan *b) {
    return a->sync_steps == b->sync_steps && a->fragment_count == b->fragment_count &&
           a->block_count == b->block_count && a->order == b->order && a->overlap_steps == b->overlap_steps &&
           a->experts_every == b->experts_every;
}

static int64_t offset(const struct outer_plan *plan, int fragment) {
    return fragment * plan->sync_steps / plan->fragment_count;
}

/* The fragment whose offset `step` has, if H steps or more stand before it. */
static int sent_after(const struct outer_plan *plan, int64_t step) {
    if (plan->sync_steps == 0 || step < plan->sync_steps)
        return -1;
    int64_t phase = step % plan->sync_steps;
    int fragment =
        (int)((phase * plan->fragment_count + plan->sync_steps - 1) / plan->sync_steps); /* not below phase */
    return fragment < plan->fragment_count && offset(plan, fragment) == phase ? fragment : -1;
}

int outer_plan_sends(const struct outer_plan *plan, int64_t step) {
    return sent_after(plan, step);
}

int outer_plan_applies(const struct outer_plan *plan, int64_t step) {
    return sent_after(plan, step - plan->overlap_steps);
}

int outer_plan_under_way(const struct outer_plan *plan, int64_t step, int64_t *sent_step) {
    for (int64_t sent = step; sent > step - plan->overlap_steps; sent--)
        if (sent_after(plan, sent) >= 0) {
            *sent_step = sent;
            return sent_after(plan, sent);
        }
    return -1;
}

int64_t outer_plan_step(const struct outer_plan *plan, int fragment, int64_t round) {
    return offset(plan, fragment) + round * plan->sync_steps;
}

int64_t outer_plan_round(const struct outer_plan *plan, int fragment, int64_t step) {
    return (step - offset(plan, fragment)) / plan->sync_steps;
}
