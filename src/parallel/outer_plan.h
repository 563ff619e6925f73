/* When which part of a model meets the other islands: the arithmetic of DiLoCo's schedule. Sends nothing.
 *
 * Parameters are cut into fragments. With one fragment it is the whole model (DiLoCo, arXiv 2311.08105). With P of them
 * the last is what stands outside the blocks (embedding, final norm, head), and the blocks are dealt over the other
 * P-1: strided (block l to fragment l mod (P-1)), which spreads fresh blocks over the depth, or sequential, in P-1
 * stretches (Streaming DiLoCo, arXiv 2501.18512).
 *
 * Fragment p has the offset t_p = floor(p H / P). It is sent after the inner steps t_p + H, t_p + 2H, ..., so that
 * every sending has H steps behind it, and applied `overlap` steps later. For H = 100 and P = 2 something is sent after
 * steps 100, 150, 200, 250. All of it follows from the number of the step, which all islands count alike. At most one
 * fragment is under way, for overlap is less than the least distance of two sendings, floor(H / P).
 */
#pragma once

#include "base/status.h"
#include <stdbool.h>
#include <stdint.h>

enum outer_order { OUTER_STRIDED, OUTER_SEQUENTIAL };

struct outer_plan {
    int64_t sync_steps;    /* H; 0: islands never meet */
    int fragment_count;    /* P */
    int block_count;       /* L */
    int order;             /* enum outer_order */
    int64_t overlap_steps; /* 0: applied in the step that it was sent in */
    int64_t experts_every; /* experts meet in every so many-th round of their fragment; 1: in each */
};

bool outer_plan_equal(const struct outer_plan *a, const struct outer_plan *b);

/* STATUS_USAGE with a line that names the settings diloco.* and says what to change. */
enum status outer_plan_check(const struct outer_plan *plan) MUST_USE;

/* One fragment for 3 blocks, as the paper has it, and one for the rest; fewer where H is too short for so many. */
int outer_plan_fragments(int block_count, int64_t sync_steps, int64_t overlap_steps);

/* The fragment of a group of parameters (parameter_group: a block, GROUP_EMBEDDING, GROUP_HEAD). */
int outer_plan_fragment_of(const struct outer_plan *plan, int group);

/* The fragment that is sent, or applied, after inner step `step` (from 1 on); -1: none. */
int outer_plan_sends(const struct outer_plan *plan, int64_t step);
int outer_plan_applies(const struct outer_plan *plan, int64_t step);

/* The step after which a fragment is sent for the first (round 1), second, ... time. */
int64_t outer_plan_step(const struct outer_plan *plan, int fragment, int64_t round);

/* The fragment that was sent at `step` or before and is to be applied after it, and when it was sent; -1: none. */
int outer_plan_under_way(const struct outer_plan *plan, int64_t step, int64_t *sent_step);

/* Of a fragment that is sent after `step`: 1 for its first sending, then 2, 3, ... */
int64_t outer_plan_round(const struct outer_plan *plan, int fragment, int64_t step);
