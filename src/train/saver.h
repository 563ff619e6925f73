/* Saving while training goes on: every rank writes its own bytes of a checkpoint, once.
 *
 * A save has three stages. Begin: rank 0 makes a draft with files of full length. Write: each rank writes, hashes and
 * flushes its share. Commit: rank 0 adds the hashes of all to the manifest and gives the checkpoint its name; then what
 * is no longer to be kept goes. Between stages the ranks agree, so that a failure of one is the failure of all and
 * nothing was published. Write and commit run in a thread of their own where saves are asynchronous; the training thread
 * asks at each step whether all are done (it adds up saver_is_busy over the ranks, with whatever else it adds up) and
 * calls saver_advance when they are.
 *
 * What is saved is what stood in memory when saver_start was called. An asynchronous save writes from there, as long as
 * nothing changes it: forward and backward do not. Before something does (the update at the end of the next step),
 * saver_detach copies what was not written by then, so that a save that is done within a step costs no copy.
 */
#pragma once

#include "train/state.h"

struct saver;

struct saver_settings {
    const char *directory; /* of checkpoints */
    uint64_t file_bytes;   /* at most so many in one file of tensors; a longer tensor has a file of its own */
    bool asynchronous;
    bool rounded;                        /* the model's file is in bf16 */
    void (*published)(const char *path); /* on every rank, when a checkpoint is there; NULL: none */
};

/* outer: of a run with islands, else NULL. Borrows model, outer, ranks and settings->directory. Takes the memory of a
 * copy of this rank's share where saves are asynchronous; as much of it is touched as is ever copied. Not collective. */
enum status saver_create(struct saver **out, const struct model *model, const struct outer *outer, struct ranks *ranks,
                         const struct saver_settings *settings) MUST_USE;

/* Waits for its thread, which gives up soon; a draft that was not committed is removed. Not collective. */
void saver_destroy(struct saver *saver);

/* Collective; nothing may be under way, and nothing between islands (outer_settle). Not asynchronous: the checkpoint is
 * published when it returns. What the sources point to stays as it is until then; so do tensors, until saver_detach. */
enum status saver_start(struct saver *saver, const struct checkpoint_sources *sources) MUST_USE;

/* Hashes of the state after the update of `step`, for that update to note (step_runner.hashes): a save of just this state then
 * need not hash what was noted. None is known yet. After saver_detach; NULL where it is of no use. Whoever changes tensors
 * between the update and the save makes it damaged. Not collective. */
struct known_hashes *saver_expect(struct saver *saver, int64_t step);

/* From here on tensors may change, whatever is under way. At once where nothing is to be written from them. Not
 * collective. */
void saver_detach(struct saver *saver);

/* Whether a save is under way: the same on all ranks. And whether this rank still works at its present stage. */
bool saver_is_under_way(const struct saver *saver);
bool saver_is_busy(const struct saver *saver);

/* Collective; to the next stage, waiting for this one. A failure is that of the save; none is under way afterwards. */
enum status saver_advance(struct saver *saver) MUST_USE;

/* Collective. Until nothing is under way. */
enum status saver_finish(struct saver *saver) MUST_USE;

/* Collective. Give up a save that is being written, as if it had never been started; one that is being committed is
 * waited for. */
enum status saver_cancel(struct saver *saver) MUST_USE;

/* Processor time of the thread in the last asynchronous save, of the stages that have ended. */
double saver_thread_seconds(const struct saver *saver);

/* Bytes that this rank writes; that the copy takes. */
uint64_t saver_share_bytes(const struct saver *saver);
uint64_t saver_copy_bytes(const struct saver *saver);
