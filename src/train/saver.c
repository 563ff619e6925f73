/* Invariants
 *  1. Only the training thread calls the transport and changes `stage`. Its helper runs one piece of work at a time
 *     (write, or commit) and touches nothing that the training thread touches until it was joined, but for the tensors
 *     that it reads under the shelter's mutex until they were copied.
 *  2. The stage is the same on all ranks: it changes only after an agreement.
 *  3. A draft is rank 0's, and exists while the stage is not STAGE_NONE.
 */
#include "train/saver.h"

#include "base/clock.h"
#include "base/log.h"
#include "base/memory.h"
#include "base/threads.h"
#include "checkpoint/publish.h"
#include "train/shares.h"
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { COPY_TASK_BYTES = 1 << 20, MESSAGE_BYTES = 1024 };

enum stage { STAGE_NONE, STAGE_WRITE, STAGE_COMMIT };

struct saver {
    struct saver_settings settings;
    struct ranks *ranks;
    const struct outer *outer; /* NULL: without islands */
    struct checkpoint_form form;
    const struct device *device;
    struct shares shares;
    char *copy;                     /* room for this rank's bytes in the order of the files; NULL: not asynchronous */
    uint64_t copy_bytes;            /* with the gaps that let each lie to the blocks of memory as it does in its file */
    uint64_t *copy_offsets;         /* [shares.count] of each stretch in the copy */
    struct sharded_stretch *copied; /* [shares.count] the same bytes, in the copy */
    struct sharded_shelter shelter; /* of the share that is being written */
    struct known_hashes hashes;     /* of the model's memory after the update of */
    int64_t hashed_step;            /* this step; -1: of none */
    const struct known_hashes *known; /* of what is being written; NULL: none */

    enum stage stage;
    struct checkpoint_sources sources;
    struct checkpoint_draft draft;         /* rank 0 */
    char root[CHECKPOINT_PATH_BYTES];      /* its path, on all ranks */
    struct sharded_extents extents;        /* what this rank wrote */
    struct checkpoint_extent *all_extents; /* what all did, on rank 0 */
    size_t all_extent_count;

    enum status (*work)(struct saver *saver);
    pthread_t thread;
    bool has_thread;
    double thread_seconds; /* of processor time, since the save began; read when the thread was joined */
    atomic_bool busy, cancel;
    enum status result;          /* of the work */
    char message[MESSAGE_BYTES]; /* where it failed: status_text belongs to a thread */
};

static bool is_first(const struct saver *s) {
    return s->ranks->world->rank == 0;
}

/* ---- the copy ---------------------------------------------------------------------------------------------------- */

/* Where each stretch stands in the copy: next to the one before if it is so in the file, else at the same place of a
 * block. */
static void place_copies(struct saver *s) {
    const struct sharded_stretch *stretches = s->shares.stretches;
    for (int i = 0; i < s->shares.count; i++) {
        bool follows = i > 0 && stretches[i - 1].file == stretches[i].file &&
                       stretches[i - 1].begin + stretches[i - 1].bytes == stretches[i].begin;
        uint64_t wanted = stretches[i].begin % FILE_BLOCK_BYTES, stands = s->copy_bytes % FILE_BLOCK_BYTES;
        if (!follows)
            s->copy_bytes += (wanted + FILE_BLOCK_BYTES - stands) % FILE_BLOCK_BYTES;
        s->copy_offsets[i] = s->copy_bytes;
        s->copy_bytes += stretches[i].bytes;
    }
}

static enum status take_copy(struct saver *s) {
    TRY(memory_alloc(&s->copy_offsets, (size_t)s->shares.count, sizeof *s->copy_offsets));
    TRY(memory_alloc(&s->copied, (size_t)s->shares.count, sizeof *s->copied));
    place_copies(s);
    if (memory_alloc_large_pages(&s->copy, s->copy_bytes) != STATUS_OK)
        return status_fail(STATUS_MEMORY,
                           "no memory for a copy of %llu bytes to save from; --checkpoint.mode sync needs none",
                           (unsigned long long)s->copy_bytes);
    for (int i = 0; i < s->shares.count; i++) {
        s->copied[i] = s->shares.stretches[i];
        s->copied[i].data = s->copy + s->copy_offsets[i];
        s->copied[i].rounded = false;
    }
    return STATUS_OK;
}

/* The stretch that byte `offset` of the copy, or the gap before it, belongs to. */
static int find_stretch(const struct saver *s, uint64_t offset) {
    int low = 0, high = s->shares.count;
    while (high - low > 1) {
        int middle = low + (high - low) / 2;
        if (s->copy_offsets[middle] <= offset)
            low = middle;
        else
            high = middle;
    }
    return low;
}

/* Bytes `from` .. `to` of the copy, as far as they are of stretch i. */
static void copy_part(const struct saver *s, int i, uint64_t from, uint64_t to) {
    const struct sharded_stretch *stretch = &s->shares.stretches[i];
    uint64_t first = s->copy_offsets[i], end = first + stretch->bytes;
    from = from > first ? from : first;
    to = to < end ? to : end;
    if (from >= to)
        return;
    sharded_fetch(stretch, from - first, (size_t)(to - from), s->device, s->copy + from);
}

/* What the writer has not taken yet. */
struct copying {
    const struct saver *saver;
    uint64_t from; /* a byte of the copy */
};

static void copy_task(void *context, int64_t task) {
    const struct copying *copying = context;
    const struct saver *s = copying->saver;
    uint64_t from = copying->from + (uint64_t)task * COPY_TASK_BYTES, to = from + COPY_TASK_BYTES;
    for (int i = find_stretch(s, from); i < s->shares.count && s->copy_offsets[i] < to; i++)
        copy_part(s, i, from, to);
}

static void copy_rest(const struct saver *s) {
    const struct sharded_shelter *at = &s->shelter;
    struct copying copying = {s, at->stretch < s->shares.count ? s->copy_offsets[at->stretch] + at->skip : s->copy_bytes};
    uint64_t bytes = s->copy_bytes - copying.from;
    parallel_for((int64_t)((bytes + COPY_TASK_BYTES - 1) / COPY_TASK_BYTES), copy_task, &copying);
}

void saver_detach(struct saver *s) {
    if (s->stage != STAGE_WRITE || !s->has_thread || !atomic_load(&s->busy))
        return;
    pthread_mutex_lock(&s->shelter.mutex);
    if (!s->shelter.moved)
        copy_rest(s);
    s->shelter.moved = s->copied;
    pthread_mutex_unlock(&s->shelter.mutex);
}

/* ---- hashes ------------------------------------------------------------------------------------------------------ */

/* Of islands' weights more than the update changes something. */
static enum status take_hashes(struct saver *s, const struct model *model) {
    s->hashed_step = -1;
    if (s->outer || model->device != device_cpu())
        return STATUS_OK;
    s->hashes.base = model->arena.base;
    s->hashes.block_count = model->arena.size / HASH_BLOCK_BYTES;
    return memory_alloc(&s->hashes.items, s->hashes.block_count, sizeof *s->hashes.items);
}

struct known_hashes *saver_expect(struct saver *s, int64_t step) {
    if (!s->hashes.items)
        return NULL;
    memset(s->hashes.items, 0, s->hashes.block_count * sizeof *s->hashes.items);
    s->hashed_step = step;
    return &s->hashes;
}

/* ---- work, maybe in the thread ----------------------------------------------------------------------------------- */

static enum status write_files(void *context) {
    const struct saver *s = context;
    return checkpoint_write_files(s->root, &s->sources);
}

static enum status write_share(struct saver *s) {
    struct sharded_way way = {.device = s->device,
                              .cancel = &s->cancel,
                              .parallel = !s->copy,
                              .known = s->known,
                              .shelter = s->copy ? &s->shelter : NULL,
                              .beside = is_first(s) ? write_files : NULL,
                              .beside_context = s};
    return sharded_write(&s->shares.set, s->root, s->shares.stretches, s->shares.count, way, &s->extents);
}

/* A checkpoint that cannot be deleted is no reason to end a run: it is told, and tried again at the next save. */
static enum status commit(struct saver *s) {
    if (!is_first(s))
        return STATUS_OK;
    struct checkpoint_written written = {(const char *const *)s->shares.set.names, s->shares.set.file_count,
                                         s->all_extents, s->all_extent_count};
    TRY(checkpoint_commit(&s->draft, &written));
    struct checkpoint_retention keep = s->sources.keep;
    keep.good_step = s->sources.state.step;
    if (checkpoint_keep(s->settings.directory, keep) != STATUS_OK)
        log_warn("%s", status_text());
    return STATUS_OK;
}

static void *run_work(void *context) {
    struct saver *s = context;
    double begin = clock_thread_seconds();
    s->result = s->work(s);
    if (s->result != STATUS_OK)
        snprintf(s->message, sizeof s->message, "%s", status_text());
    s->thread_seconds += clock_thread_seconds() - begin;
    atomic_store(&s->busy, false);
    return NULL;
}

/* Without a thread to be had it works in this one. */
static void start_work(struct saver *s, enum status (*work)(struct saver *saver)) {
    s->work = work;
    atomic_store(&s->busy, true);
    s->has_thread = s->settings.asynchronous && pthread_create(&s->thread, NULL, run_work, s) == 0;
    if (!s->has_thread)
        run_work(s);
}

static enum status end_work(struct saver *s) {
    if (s->has_thread)
        pthread_join(s->thread, NULL);
    s->has_thread = false;
    return s->result == STATUS_OK ? STATUS_OK : status_fail(s->result, "%s", s->message);
}

/* ---- stages ------------------------------------------------------------------------------------------------------ */

static void forget(struct saver *s) {
    if (s->draft.path)
        checkpoint_abandon(&s->draft);
    free(s->extents.items);
    free(s->all_extents);
    s->extents = (struct sharded_extents){0};
    s->all_extents = NULL;
    s->all_extent_count = 0;
    s->stage = STAGE_NONE;
}

static enum status make_draft(struct saver *s) {
    if (!is_first(s))
        return STATUS_OK;
    TRY(checkpoint_begin(&s->draft, s->settings.directory, s->sources.state.step));
    if (strlen(s->draft.path) >= sizeof s->root)
        return status_fail(STATUS_USAGE, "%s: this path is too long", s->draft.path);
    strcpy(s->root, s->draft.path);
    return sharded_create(&s->shares.set, s->root);
}

enum status saver_start(struct saver *s, const struct checkpoint_sources *sources) {
    CHECK(s->stage == STAGE_NONE);
    s->sources = *sources;
    s->sources.state.form = s->form;
    if (s->outer)
        s->sources.state.plan = s->outer->options.plan;
    memset(s->root, 0, sizeof s->root);
    atomic_store(&s->cancel, false);
    enum status status = comm_agree(s->ranks->world, make_draft(s));
    if (status == STATUS_OK)
        status = comm_broadcast(s->ranks->world, s->root, sizeof s->root);
    if (status != STATUS_OK) {
        forget(s);
        return status;
    }
    s->shelter.stretch = 0;
    s->shelter.skip = 0;
    s->shelter.moved = NULL;
    s->thread_seconds = 0;
    s->known = s->hashed_step == s->sources.state.step ? &s->hashes : NULL;
    s->stage = STAGE_WRITE;
    start_work(s, write_share);
    return s->settings.asynchronous ? STATUS_OK : saver_finish(s);
}

/* counts [3][ranks]: what each rank has, what is sent, what comes; offsets alike. */
static enum status send_extents(struct saver *s, int64_t *counts, struct comm *world) {
    int size = world->size;
    int64_t *send = counts + size, *send_at = send + size, *recv = send_at + size, *recv_at = recv + size, total = 0;
    send[0] = counts[world->rank];
    for (int r = 0; r < size && world->rank == 0; r++) {
        recv[r] = counts[r];
        recv_at[r] = total;
        total += counts[r];
    }
    TRY(comm_agree(world, memory_alloc(&s->all_extents, (size_t)total, 1)));
    struct comm_request request;
    s->all_extent_count = (size_t)total / sizeof *s->all_extents;
    TRY(world->ops->all_to_all(world, s->extents.items, send, send_at, s->all_extents, recv, recv_at, &request));
    return world->ops->wait(world, &request);
}

/* What all ranks wrote, to rank 0. */
static enum status collect_extents(struct saver *s) {
    struct comm *world = s->ranks->world;
    int64_t *counts = NULL, mine = (int64_t)(s->extents.count * sizeof *s->extents.items);
    enum status status = comm_agree(world, memory_alloc(&counts, 5 * (size_t)world->size, sizeof *counts));
    if (status == STATUS_OK)
        status = comm_share(world, &mine, sizeof mine, counts);
    if (status == STATUS_OK)
        status = send_extents(s, counts, world);
    free(counts);
    return status;
}

static enum status end_write(struct saver *s) {
    TRY(comm_agree(s->ranks->world, end_work(s)));
    TRY(collect_extents(s));
    s->stage = STAGE_COMMIT;
    start_work(s, commit);
    return STATUS_OK;
}

static enum status end_commit(struct saver *s) {
    TRY(comm_agree(s->ranks->world, end_work(s)));
    char *path = text_format("%s/step-%06lld", s->settings.directory, (long long)s->sources.state.step);
    if (s->settings.published)
        s->settings.published(path);
    free(path);
    forget(s);
    return STATUS_OK;
}

enum status saver_advance(struct saver *s) {
    enum status status = s->stage == STAGE_WRITE ? end_write(s) : s->stage == STAGE_COMMIT ? end_commit(s) : STATUS_OK;
    if (status != STATUS_OK)
        forget(s);
    return status;
}

enum status saver_finish(struct saver *s) {
    while (s->stage != STAGE_NONE)
        TRY(saver_advance(s));
    return STATUS_OK;
}

enum status saver_cancel(struct saver *s) {
    if (s->stage != STAGE_WRITE)
        return saver_finish(s);
    atomic_store(&s->cancel, true);
    enum status status = end_work(s);
    status = comm_agree(s->ranks->world, status == STATUS_INTERRUPTED ? STATUS_OK : status);
    forget(s);
    return status;
}

bool saver_is_under_way(const struct saver *s) {
    return s->stage != STAGE_NONE;
}

bool saver_is_busy(const struct saver *s) {
    return atomic_load(&s->busy);
}

double saver_thread_seconds(const struct saver *s) {
    return s->thread_seconds;
}

uint64_t saver_share_bytes(const struct saver *s) {
    return s->shares.bytes;
}

uint64_t saver_copy_bytes(const struct saver *s) {
    return s->copy_bytes;
}

/* ---- life and death ---------------------------------------------------------------------------------------------- */

enum status saver_create(struct saver **out, const struct model *model, const struct outer *outer, struct ranks *ranks,
                         const struct saver_settings *settings) {
    struct saver *s;
    TRY(memory_alloc(&s, 1, sizeof *s));
    pthread_mutex_init(&s->shelter.mutex, NULL); /* of the default kind: does not fail here */
    s->settings = *settings;
    s->ranks = ranks;
    s->outer = outer;
    s->form = (struct checkpoint_form){checkpoint_island_count(model, outer), settings->rounded};
    s->device = model->device;
    enum status status = shares_init(&s->shares, model, outer, settings->rounded, settings->file_bytes);
    if (status == STATUS_OK)
        status = take_hashes(s, model);
    if (status == STATUS_OK && settings->asynchronous)
        status = take_copy(s);
    if (status != STATUS_OK)
        saver_destroy(s);
    else
        *out = s;
    return status;
}

void saver_destroy(struct saver *s) {
    if (!s)
        return;
    atomic_store(&s->cancel, true);
    if (s->has_thread)
        pthread_join(s->thread, NULL);
    forget(s);
    shares_release(&s->shares);
    free(s->copy);
    free(s->copy_offsets);
    free(s->copied);
    free(s->hashes.items);
    pthread_mutex_destroy(&s->shelter.mutex);
    free(s);
}
