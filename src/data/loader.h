/* Batches of sequences for training, in an order that depends on the seed and a cursor only.
 *
 * The shard is cut into windows of T+1 tokens (inputs, and targets one further). An epoch draws each window once, in an
 * order permuted by (seed, epoch); from the second epoch on all windows are shifted by a random part of T, so that cuts
 * fall elsewhere. Sequence number n of a run is a pure function of n: the cursor alone resumes exactly.
 */
#pragma once

#include "data/corpus.h"

struct loader;

/* Borrows the shard. STATUS_FORMAT where it has fewer than T+1 tokens. A thread reads ahead. */
enum status loader_open(struct loader **out, const struct token_shard *shard, int64_t sequence_length,
                        int64_t batch_sequences, uint64_t seed, int64_t first_sequence) MUST_USE;
void loader_close(struct loader *loader); /* NULL is allowed */

/* The next batch: tokens [batch_sequences, T+1]. */
enum status loader_next(struct loader *loader, int32_t *tokens) MUST_USE;

/* Number of sequences handed out, first_sequence included. */
int64_t loader_cursor(const struct loader *loader);
