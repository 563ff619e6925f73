/* Which steps are believed, and what is done about those that are not.
 *
 * Before a step commits, its loss and the norm of its gradient are held against those of the last accepted steps; after
 * it, the answer is noted. Pure logic on a small state that checkpoints carry (train/state.h), so that a resumed run
 * takes the decisions of an uninterrupted one. The same on every rank, for all see the same numbers (parallel/step.h).
 *
 *   a step is refused    where it is not finite, or the ranks do not agree on it, whatever the settings;
 *                        where its loss is above  median + max(6 MAD, 0.1 nats, 5 % of the median), or the norm of its
 *                        gradient above  10 x median,  of the last 64 accepted steps, once there are 32 of them
 *   the run rolls back   after 3 refused steps in a row; with SPIKES_ROLL_BACK after a single spike
 *   the run ends         where it would roll back for the rollback_limit + 1st time without having got 64 steps past
 *                        the step that the last of them began at
 *
 * MAD is the median of the distances from the median; 6 of them are about 4 standard deviations of a normal noise. The
 * floors are there because a smooth loss has next to none. Measured: of steps whose loss is normal noise with a
 * deviation of 0.2 nats 3 in ten thousand are taken for spikes, for 64 values know their MAD only so well.
 *
 * SPIKES_SKIP is the default: a refused spike has not touched the weights, so that there is nothing to undo; if the
 * weights are the cause, the next steps are refused as well, and three in a row roll back. An innocent step that looks
 * like a spike costs its batch and no more, where a rollback would cost all since the checkpoint; three in a row by
 * chance (3 in 10^11) do not happen.
 *
 * Source: the restarts of PaLM (arXiv 2204.02311, section 5.1), with a robust rule in the place of an eye.
 */
#pragma once

#include "base/json.h"
#include "parallel/step.h"

enum guard_spikes { SPIKES_SKIP, SPIKES_ROLL_BACK, SPIKES_IGNORE };

enum { GUARD_HISTORY = 64, GUARD_HISTORY_LEAST = 32, GUARD_SKIPPED_MAX = 3 };

struct guard_settings {
    int spikes; /* enum guard_spikes */
    int64_t rollback_limit;
};

/* Zeroed: the start of a run. */
struct guard {
    double loss[GUARD_HISTORY], gradient_norm[GUARD_HISTORY]; /* of accepted steps, oldest first; finite */
    int count;
    int64_t skipped_in_a_row;
    int64_t rollbacks;     /* since the run last got past furthest_step */
    int64_t furthest_step; /* at which one of them began */
};

/* For the next step. */
struct step_limits guard_limits(const struct guard *guard, struct guard_settings settings);

enum guard_verdict { GUARD_GO_ON, GUARD_ROLL_BACK, GUARD_GIVE_UP };

/* Update `step` is done, or was refused. */
enum guard_verdict guard_note(struct guard *guard, struct guard_settings settings, int64_t step,
                              const struct step_result *result);

/* `guard` is that of a checkpoint that was gone back to: it learns of the rollback that began at `step` with `before`.
 * What was refused in a row before the checkpoint was so on data that is not met again. */
void guard_roll_back(struct guard *guard, const struct guard *before, int64_t step);

/* For a file; numbers come back bit for bit. The source's object is what was packed; one that is not there gives an
 * empty guard. */
json_t *guard_pack(const struct guard *guard);
enum status guard_unpack(struct json_source source, struct guard *guard) MUST_USE;
