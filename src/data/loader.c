#include "data/loader.h"

#include "base/memory.h"
#include "base/random.h"
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

enum { BATCHES_AHEAD = 2 };

/* The reader fills slots in turn, the caller empties them in turn; `filled` counts those ready. */
struct loader {
    const struct token_shard *shard;
    int64_t sequence_length, batch_sequences;
    uint64_t seed;
    int64_t cursor; /* sequences handed out */
    int32_t *slots[BATCHES_AHEAD];
    int64_t read_cursor; /* of the thread */
    int filled, next_slot;
    bool stopping, thread_runs;
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t changed;
};

static void read_sequence(const struct loader *l, int64_t sequence, int32_t *out) {
    int64_t length = l->sequence_length;
    /* The last window of a shifted epoch must still fit, so such an epoch may have one window fewer. */
    int64_t windows = (l->shard->token_count - 1) / length, shifted = (l->shard->token_count - 1 - (length - 1)) / length;
    int64_t epoch = 0, index = sequence, offset = 0, count = windows;
    if (sequence >= windows && shifted > 0) {
        epoch = 1 + (sequence - windows) / shifted;
        index = (sequence - windows) % shifted;
        count = shifted;
        offset = (int64_t)(random_bits(l->seed, random_stream("window offset"), (uint64_t)epoch) % (uint64_t)length);
    } else if (sequence >= windows) {
        epoch = sequence / windows;
        index = sequence % windows;
    }
    uint64_t stream = random_stream("window order") + (uint64_t)epoch;
    int64_t window = (int64_t)random_permute(l->seed, stream, (uint64_t)count, (uint64_t)index);
    token_shard_copy(l->shard, window * length + offset, length + 1, out);
}

static void read_batch(struct loader *l, int32_t *out) {
    for (int64_t i = 0; i < l->batch_sequences; i++)
        read_sequence(l, l->read_cursor + i, out + i * (l->sequence_length + 1));
    l->read_cursor += l->batch_sequences;
}

static void *read_ahead(void *context) {
    struct loader *l = context;
    int slot = 0;
    pthread_mutex_lock(&l->lock);
    while (!l->stopping) {
        if (l->filled == BATCHES_AHEAD) {
            pthread_cond_wait(&l->changed, &l->lock);
            continue;
        }
        pthread_mutex_unlock(&l->lock);
        read_batch(l, l->slots[slot]); /* nobody else touches a slot that is not filled */
        pthread_mutex_lock(&l->lock);
        slot = (slot + 1) % BATCHES_AHEAD;
        l->filled++;
        pthread_cond_broadcast(&l->changed);
    }
    pthread_mutex_unlock(&l->lock);
    return NULL;
}

static enum status start(struct loader *l) {
    size_t tokens = (size_t)(l->batch_sequences * (l->sequence_length + 1));
    for (int i = 0; i < BATCHES_AHEAD; i++)
        TRY(memory_alloc(&l->slots[i], tokens, sizeof **l->slots));
    pthread_mutex_init(&l->lock, NULL);
    pthread_cond_init(&l->changed, NULL);
    if (pthread_create(&l->thread, NULL, read_ahead, l) != 0)
        return status_fail(STATUS_MEMORY, "cannot start the thread that reads data");
    l->thread_runs = true;
    return STATUS_OK;
}

enum status loader_open(struct loader **out, const struct token_shard *shard, int64_t sequence_length,
                        int64_t batch_sequences, uint64_t seed, int64_t first_sequence) {
    if (shard->token_count < sequence_length + 1)
        return status_fail(STATUS_FORMAT,
                           "the text has %lld tokens, one sequence needs %lld; add text or shorten train.sequence_length",
                           (long long)shard->token_count, (long long)sequence_length + 1);
    struct loader *l;
    TRY(memory_alloc(&l, 1, sizeof *l));
    l->shard = shard;
    l->sequence_length = sequence_length;
    l->batch_sequences = batch_sequences;
    l->seed = seed;
    l->cursor = l->read_cursor = first_sequence;
    enum status status = start(l);
    if (status != STATUS_OK) {
        loader_close(l);
        return status;
    }
    *out = l;
    return STATUS_OK;
}

void loader_close(struct loader *l) {
    if (!l)
        return;
    if (l->thread_runs) {
        pthread_mutex_lock(&l->lock);
        l->stopping = true;
        pthread_cond_broadcast(&l->changed);
        pthread_mutex_unlock(&l->lock);
        pthread_join(l->thread, NULL);
        pthread_mutex_destroy(&l->lock);
        pthread_cond_destroy(&l->changed);
    }
    for (int i = 0; i < BATCHES_AHEAD; i++)
        free(l->slots[i]);
    free(l);
}

enum status loader_next(struct loader *l, int32_t *tokens) {
    size_t bytes = (size_t)(l->batch_sequences * (l->sequence_length + 1)) * sizeof *tokens;
    pthread_mutex_lock(&l->lock);
    while (l->filled == 0)
        pthread_cond_wait(&l->changed, &l->lock);
    memcpy(tokens, l->slots[l->next_slot], bytes);
    l->next_slot = (l->next_slot + 1) % BATCHES_AHEAD;
    l->filled--;
    l->cursor += l->batch_sequences;
    pthread_cond_broadcast(&l->changed);
    pthread_mutex_unlock(&l->lock);
    return STATUS_OK;
}

int64_t loader_cursor(const struct loader *l) {
    return l->cursor;
}
