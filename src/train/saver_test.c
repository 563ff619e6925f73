/* Saves by many ranks: any layout to any other, what was saved is what stood there, every operation and allocation
 * failing. */
#include "train/saver.h"

#include "base/random.h"
#include "comm/threads/comm_threads.h"
#include "train/checkpoint_testing.h"
#include "train/shares.h"
#include <errno.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

/* ---- ranks with a model ------------------------------------------------------------------------------------------ */

struct layout_case {
    int replicate, shard, expert, zero;
};

static const struct layout_case single = {1, 1, 1, 0};

/* What the ranks of a layout are to do. */
struct job {
    struct layout_case layout;
    const char *from, *to; /* directories of checkpoints; from NULL: weights of a seed */
    int64_t step;
    uint64_t file_bytes;
    bool dense;
    int64_t vocab_size; /* 0: of the small model */
    bool rounded;
    bool asynchronous, mutates; /* changes every tensor once it may, */
    int pause_us;               /* so long after saver_start returned, */
    int write;                  /* or while its writer is about to begin this write, from 1 */
    bool write_came;
    int64_t expected_step;      /* of which hashes are noted before; 0: none */
    bool spoils;                /* one of them is wrong */
    enum checkpoint_read read;
    enum { SAVE_ONCE, SAVE_TWICE_WAITING, SAVE_TWICE_REPLACING, SAVE_AND_LEAVE } course;
    /* what came out, of rank 0 */
    struct train_state state;
    int published;
};

static void fill(const struct model *model, uint64_t seed) {
    for (int i = 0; i < model->table.count; i++) {
        struct tensor arrays[] = {model->own_weight[i], model->moment1[i], model->moment2[i]};
        for (int a = 0; a < 3; a++) {
            uint64_t first = random_bits(seed, (uint64_t)(3 * i + a), 0);
            size_t count = tensor_bytes(arrays[a]) / 4;
            for (size_t k = 0; k < count; k++) /* odd steps: no two of an array are equal */
                ((uint32_t *)arrays[a].data)[k] = (uint32_t)(first + k * 0x9E3779B9u);
        }
    }
}

static _Atomic int published_count;

static void note_published(const char *path) {
    (void)path;
    published_count++;
}

struct rank {
    struct ranks ranks;
    struct model *model;
    struct saver *saver;
    struct tokenizer *tokenizer;
};

static void close_rank(struct rank *r) {
    saver_destroy(r->saver);
    tokenizer_destroy(r->tokenizer);
    model_destroy(r->model);
    ranks_close(&r->ranks);
}

static enum status open_rank(struct rank *r, const struct job *job, struct comm *world) {
    const int size[MESH_AXIS_COUNT] = {1, job->layout.replicate, job->layout.shard, job->layout.expert};
    struct mesh mesh = mesh_make(size, world->rank);
    struct model_config config = small_config(job->dense);
    config.vocab_size = job->vocab_size > 0 ? job->vocab_size : config.vocab_size;
    const struct kernel_ops *ops;
    struct saver_settings settings = {job->to, job->file_bytes, job->asynchronous, job->rounded, note_published};
    TRY(kernels_choose("portable", &ops));
    TRY(ranks_open(&r->ranks, &mesh, world, (struct comm_memory){0}));
    struct model_options options = {ops, device_cpu(), DTYPE_F32, DTYPE_F32, 16, true, {mesh, job->layout.zero}};
    enum status status = model_create(&config, options, &r->model);
    if (status == STATUS_OK)
        status = tokenizer_open(tokenizer_path, &r->tokenizer);
    if (status == STATUS_OK)
        status = saver_create(&r->saver, r->model, NULL, &r->ranks, &settings);
    return comm_agree(world, status);
}

/* As an update that writes what stands there would. */
static void note_hashes(struct rank *r, const struct job *job) {
    struct known_hashes *known = saver_expect(r->saver, job->expected_step);
    assert_non_null(known);
    for (int i = 0; i < r->model->table.count; i++) {
        struct tensor arrays[] = {r->model->own_weight[i], r->model->moment1[i], r->model->moment2[i]};
        for (int a = 0; a < 3; a++)
            hash_blocks(arrays[a].data, tensor_bytes(arrays[a]) / HASH_BLOCK_BYTES * HASH_BLOCK_BYTES,
                        known_hashes_at(known, arrays[a].data));
    }
    if (job->spoils)
        ++*known_hashes_at(known, (char *)r->model->own_weight[0].data + 5 * HASH_BLOCK_BYTES);
}

/* Holds the writer at a write. */
static struct gate {
    _Atomic int countdown;
    _Atomic bool reached, open;
} gate;

static int wait_at_gate(void *context, enum file_operation operation, const char *path) {
    (void)context;
    (void)path;
    if (operation == FILE_WRITE && --gate.countdown == 0) {
        gate.reached = true;
        while (!gate.open)
            usleep(100);
    }
    return 0;
}

/* Lets everything change as soon as it may. */
static void mutate(struct rank *r, struct job *job) {
    if (job->write > 0) {
        while (!gate.reached && saver_is_busy(r->saver))
            usleep(100);
        job->write_came = gate.reached;
    } else {
        usleep((useconds_t)job->pause_us);
    }
    saver_detach(r->saver);
    fill(r->model, 99);
    gate.open = true;
}

static enum status start(struct rank *r, struct job *job, int64_t step) {
    if (job->expected_step > 0)
        note_hashes(r, job);
    struct checkpoint_sources sources = {
        tokenizer_path,    config_path,  NULL,
        &r->model->config, r->tokenizer, {.step = step, .sequences = 8 * step, .tokens = 128 * step, .best_step = -1},
        {9, 0, -1, -1},    NULL};
    if (job->write > 0) {
        gate.countdown = job->write;
        gate.reached = gate.open = false;
        file_set_fault(wait_at_gate, NULL);
    }
    TRY(saver_start(r->saver, &sources));
    if (job->mutates)
        mutate(r, job);
    if (job->write > 0)
        file_set_fault(NULL, NULL);
    return STATUS_OK;
}

static enum status save(struct rank *r, struct job *job) {
    TRY(start(r, job, job->step));
    if (job->course == SAVE_AND_LEAVE)
        return STATUS_OK;
    if (job->course == SAVE_TWICE_WAITING)
        TRY(saver_finish(r->saver));
    if (job->course == SAVE_TWICE_REPLACING)
        TRY(saver_cancel(r->saver));
    if (job->course != SAVE_ONCE)
        TRY(start(r, job, job->step + 1));
    return saver_finish(r->saver);
}

static enum status run_rank(void *context, struct comm *world) {
    struct job *job = context;
    struct rank r = {0};
    struct train_state state = {0};
    char path[CHECKPOINT_PATH_BYTES];
    enum status status = open_rank(&r, job, world);
    if (status == STATUS_OK && job->from) {
        fill(r.model, 7); /* whatever is not read shows */
        status = checkpoint_resume(job->from, r.model, NULL, &r.ranks, job->read, &state, path);
        if (status == STATUS_OK && !*path)
            status = status_fail(STATUS_NOT_FOUND, "no good checkpoint");
    } else if (status == STATUS_OK) {
        fill(r.model, 1);
    }
    if (status == STATUS_OK && world->rank == 0)
        job->state = state;
    if (status == STATUS_OK && job->to)
        status = save(&r, job);
    close_rank(&r);
    return status;
}

static enum status run(struct job *job) {
    published_count = 0;
    enum status status =
        comm_threads_run(job->layout.replicate * job->layout.shard * job->layout.expert, run_rank, job);
    job->published = published_count;
    return status;
}

static void run_well(struct job *job) {
    if (run(job) != STATUS_OK)
        fail_msg("%d x %d x %d, stage %d: %s", job->layout.replicate, job->layout.shard, job->layout.expert,
                 job->layout.zero, status_text());
}

/* ---- any layout to any other ------------------------------------------------------------------------------------- */

/* Rank r's layout among 12 of 1 to 8 ranks: 5 experts are divided unevenly over 2, 3 and 4. */
static const struct layout_case layouts[] = {{1, 1, 1, 0}, {2, 1, 1, 0}, {1, 2, 1, 3}, {1, 1, 2, 2},
                                             {3, 1, 1, 1}, {1, 3, 1, 2}, {1, 1, 3, 3}, {2, 2, 1, 3},
                                             {1, 2, 2, 1}, {2, 1, 3, 3}, {2, 2, 2, 3}, {1, 2, 4, 3}};
enum { LAYOUT_COUNT = sizeof layouts / sizeof *layouts };

/* Every weight of the model's file is that of the other in bf16. */
static void assert_rounded(const char *exact, const char *rounded) {
    struct weights a, b;
    assert_int_equal(weights_open(&a, exact), STATUS_OK);
    assert_int_equal(weights_open(&b, rounded), STATUS_OK);
    assert_int_equal(a.name_count, b.name_count);
    for (int i = 0; i < a.name_count; i++) {
        const struct safetensors *file_a, *file_b;
        const struct safetensors_entry *entry_a = weights_find(&a, a.names[i].name, &file_a);
        const struct safetensors_entry *entry_b = weights_find(&b, a.names[i].name, &file_b);
        assert_non_null(entry_b);
        assert_int_equal(entry_b->dtype, SAFETENSORS_BF16);
        int64_t count = safetensors_elements(entry_a);
        float *full = malloc((size_t)count * sizeof *full);
        uint16_t *half = malloc((size_t)count * sizeof *half);
        assert_int_equal(safetensors_read(file_a, entry_a, 0, count, DTYPE_F32, full), STATUS_OK);
        assert_int_equal(safetensors_read(file_b, entry_b, 0, count, DTYPE_BF16, half), STATUS_OK);
        for (int64_t k = 0; k < count; k++)
            assert_int_equal(half[k], float_to_bf16(full[k]));
        free(full);
        free(half);
    }
    weights_close(&a);
    weights_close(&b);
}

/* The checkpoint that all layouts are to save: as it is, and rounded. */
static void save_canonical(char *origins[2], char *canonical[2]) {
    for (int rounded = 0; rounded < 2; rounded++) {
        origins[rounded] = directory_of("origin", rounded);
        canonical[rounded] = checkpoint_in(origins[rounded], 3);
        struct job job = {single, .to = origins[rounded], .step = 3, .file_bytes = 1 << 30, .rounded = rounded};
        run_well(&job);
    }
    assert_rounded(canonical[0], canonical[1]);
}

/* From a device other than the processor they come through a buffer, in parts. */
static void test_rounded_from_a_device(void **state) {
    (void)state;
    enum { COUNT = 50001 };
    const struct device other = *device_cpu();
    float *floats = malloc(COUNT * sizeof *floats);
    uint16_t *here = malloc(COUNT * sizeof *here), *there = malloc(COUNT * sizeof *there);
    for (uint64_t i = 0; i < COUNT; i++)
        ((uint32_t *)floats)[i] = (uint32_t)random_bits(8, 0, i);
    const struct sharded_stretch stretch = {0, 4096, 2 * COUNT, floats, true};
    sharded_fetch(&stretch, 6, 2 * (COUNT - 3), device_cpu(), (char *)here);
    sharded_fetch(&stretch, 6, 2 * (COUNT - 3), &other, (char *)there);
    for (int i = 0; i < COUNT - 3; i++) {
        assert_int_equal(here[i], float_to_bf16(floats[i + 3]));
        assert_int_equal(there[i], here[i]);
    }
    free(floats);
    free(here);
    free(there);
}

/* Saved on A and loaded on B, for all 144 pairs, rounded and not: B saves the same files, byte for byte. */
static void test_any_layout_to_any_other(void **state) {
    (void)state;
    char *origins[2], *canonical[2];
    save_canonical(origins, canonical);
    for (int a = 0; a < LAYOUT_COUNT; a++) {
        char *from = disk_directory_of("a", a), *saved = checkpoint_in(from, 3);
        bool rounded = a % 3 == 1;
        struct job save_a = {layouts[a],        .from = origins[a / 2 % 2], .to = from,
                             .step = 3,         .file_bytes = 1 << 30,      .asynchronous = a % 2,
                             .rounded = rounded};
        run_well(&save_a);
        assert_same_checkpoint(canonical[rounded], saved);
        for (int b = a % EVERY_CASE; b < LAYOUT_COUNT; b += EVERY_CASE) {
            char *to = directory_of("b", b), *again = checkpoint_in(to, 3);
            struct job save_b = {layouts[b],
                                 .from = from,
                                 .to = to,
                                 .step = 3,
                                 .file_bytes = 1 << 30,
                                 .rounded = b % 4 == 1,
                                 .read = (a + b) % 2 ? CHECKPOINT_READ_BROADCAST : CHECKPOINT_READ_EACH};
            run_well(&save_b);
            assert_int_equal(save_b.state.step, 3);
            assert_int_equal(save_b.published, layouts[b].replicate * layouts[b].shard * layouts[b].expert);
            assert_same_checkpoint(canonical[b % 4 == 1], again);
            remove_all(to);
            free(again);
            free(to);
        }
        remove_all(from);
        free(saved);
        free(from);
    }
    for (int i = 0; i < 2; i++) {
        free(canonical[i]);
        free(origins[i]);
    }
}

/* Every byte of the tensor files has one writer: their shares together are the whole. */
static void test_every_byte_is_written_once(void **state) {
    (void)state;
    for (int i = 0; i < 2 * LAYOUT_COUNT; i++) {
        struct layout_case l = layouts[i / 2];
        const int size[MESH_AXIS_COUNT] = {1, l.replicate, l.shard, l.expert};
        uint64_t total = 0, most = 0, whole = 0, headers = 0;
        int ranks = l.replicate * l.shard * l.expert;
        for (int r = 0; r < ranks; r++) {
            struct model_config config = small_config(false);
            const struct kernel_ops *ops;
            struct model *model;
            struct shares shares;
            assert_int_equal(kernels_choose("portable", &ops), STATUS_OK);
            struct model_options options = {
                ops, device_cpu(), DTYPE_F32, DTYPE_F32, 16, true, {mesh_make(size, r), l.zero}};
            assert_int_equal(model_create_shapes(&config, options, &model), STATUS_OK);
            assert_int_equal(shares_init(&shares, model, NULL, i % 2, 1 << 30), STATUS_OK);
            total += shares.bytes;
            whole = sharded_bytes(&shares.set);
            for (int f = 0; f < shares.set.file_count && r == 0; f++)
                headers += shares.set.plans[f].header_bytes;
            uint64_t data = shares.bytes - (r == 0 ? headers : 0);
            most = data > most ? data : most;
            shares_release(&shares);
            model_destroy(model);
        }
        assert_int_equal(total, whole);
        if (5 % l.expert == 0) /* whole experts are uneven otherwise */
            assert_true((double)most < 1.2 * (double)(whole - headers) / ranks);
    }
}

/* Replicas divide a large tensor between blocks, evenly. */
static void test_parts_begin_at_blocks(void **state) {
    (void)state;
    enum { REPLICAS = 3 };
    const int size[MESH_AXIS_COUNT] = {1, REPLICAS, 1, 1};
    struct model_config config = small_config(false);
    const struct kernel_ops *ops;
    uint64_t least = UINT64_MAX, most = 0;
    config.vocab_size = 8192 * 5;
    assert_int_equal(kernels_choose("portable", &ops), STATUS_OK);
    for (int r = 0; r < REPLICAS; r++) {
        struct model *model;
        struct shares shares;
        struct model_options options = {ops, device_cpu(), DTYPE_F32, DTYPE_F32, 16, true, {mesh_make(size, r), 0}};
        int large = 0;
        assert_int_equal(model_create_shapes(&config, options, &model), STATUS_OK);
        assert_int_equal(shares_init(&shares, model, NULL, false, 1 << 30), STATUS_OK);
        for (int i = 0; i < shares.count; i++) {
            if (shares.stretches[i].bytes < 1 << 18)
                continue;
            assert_int_equal(shares.stretches[i].begin % FILE_BLOCK_BYTES, 0);
            assert_int_equal(shares.stretches[i].bytes % FILE_BLOCK_BYTES, 0);
            large++;
        }
        assert_true(large >= 3); /* the embedding and its moments */
        least = shares.bytes < least ? shares.bytes : least;
        most = shares.bytes > most ? shares.bytes : most;
        shares_release(&shares);
        model_destroy(model);
    }
    assert_true((double)most < 1.05 * (double)least);
}

/* A small limit gives many files and an index, which are read back like one. */
static void test_many_files(void **state) {
    (void)state;
    const struct layout_case wide = {1, 2, 2, 3};
    char *one = directory_of("one", 0), *many = disk_directory_of("many", 0), *back = directory_of("back", 0);
    char *first = checkpoint_in(one, 1), *divided = checkpoint_in(many, 1), *joined = checkpoint_in(back, 1);
    struct job save_one = {single, .to = one, .step = 1, .file_bytes = 1 << 30};
    struct job save_many = {wide, .from = one, .to = many, .step = 1, .file_bytes = 3000, .asynchronous = true};
    struct job save_back = {single, .from = many, .to = back, .step = 1, .file_bytes = 1 << 30};
    run_well(&save_one);
    run_well(&save_many);
    run_well(&save_back);
    assert_same_checkpoint(first, joined);
    char *index = path_join(divided, "model.safetensors.index.json"),
         *single_file = path_join(divided, "model.safetensors");
    char *moments = path_join(divided, "training/optimizer.safetensors.index.json");
    assert_true(file_exists(index) && file_exists(moments) && !file_exists(single_file));
    const char *const all[] = {one, many, back};
    for (int i = 0; i < 3; i++)
        remove_all(all[i]);
    free(index), free(single_file), free(moments), free(one), free(many), free(back), free(first), free(divided),
        free(joined);
}

/* VOCABULARY_OF_BLOCKS: the embedding is whole blocks, and written from where it stands; else it is copied. */
enum { VOCABULARY_OF_BLOCKS = 81920, VOCABULARY_ODD = 82001 };

/* Tensors of several extents that change at some moment of the writing: what was there is saved, and nothing of what came. */
static void change_while_it_is_written(struct job *job, const char *expected) {
    char *async = disk_directory_of("async", 0), *found = checkpoint_in(async, 5);
    job->to = async;
    job->asynchronous = job->mutates = true;
    run_well(job);
    assert_same_checkpoint(expected, found);
    assert_int_equal(checkpoint_verify(found), STATUS_OK);
    remove_all(async);
    free(found);
    free(async);
}

/* In the middle of each write, and at some moments between. */
static void test_changed_while_it_is_written(void **state) {
    (void)state;
    enum { MOMENTS = 3, LONGEST_US = 20000 };
    static const struct {
        int64_t vocab_size, expected_step;
        bool rounded;
    } forms[] = {{VOCABULARY_ODD, 0, false},
                 {VOCABULARY_OF_BLOCKS, 0, false},
                 {VOCABULARY_OF_BLOCKS, 5, false},
                 {VOCABULARY_OF_BLOCKS, 5, true},
                 {VOCABULARY_ODD, 0, true}};
    for (int form = 0; form < 5; form++) {
        char *sync = directory_of("sync", 0), *expected = checkpoint_in(sync, 5);
        struct job job = {single,
                          .to = sync,
                          .step = 5,
                          .file_bytes = 1 << 30,
                          .vocab_size = forms[form].vocab_size,
                          .rounded = forms[form].rounded};
        run_well(&job);
        job.expected_step = forms[form].expected_step;
        job.write_came = true;
        for (job.write = 1 + form % 3; job.write_came; job.write += 3)
            change_while_it_is_written(&job, expected);
        assert_true(job.write > 8);
        job.write = 0;
        for (int moment = 0; moment < MOMENTS; moment++) {
            job.pause_us = LONGEST_US * moment / MOMENTS;
            change_while_it_is_written(&job, expected);
        }
        remove_all(sync);
        free(expected);
        free(sync);
    }
}

/* Tensors of whole blocks are read into where they stand, by ranks that hold all of them or a part; damage is found there, too. */
static void load_in_place(const char *from, const char *expected) {
    static const struct layout_case some[] = {{1, 1, 1, 0}, {1, 2, 1, 3}, {2, 1, 1, 0}};
    char *to = disk_directory_of("loaded", 0), *found = checkpoint_in(to, 5);
    char *path = path_join(from, "step-000005/model.safetensors");
    struct job job = {.from = from, .to = to, .step = 5, .file_bytes = 1 << 30, .vocab_size = VOCABULARY_OF_BLOCKS};
    for (int i = 0; i < 3; i++) {
        job.layout = some[i];
        run_well(&job);
        assert_same_checkpoint(expected, found);
        remove_all(to);
    }
    FILE *file = fopen(path, "r+b");
    assert_non_null(file);
    assert_int_equal(fseek(file, 3000000, SEEK_SET), 0);
    int byte = fgetc(file);
    assert_int_equal(fseek(file, 3000000, SEEK_SET), 0);
    assert_true(fputc(byte ^ 8, file) != EOF && fclose(file) == 0);
    assert_int_equal(run(&job), STATUS_NOT_FOUND);
    free(path);
    free(found);
    free(to);
}

/* What an update noted is believed, of the step that it was noted for. */
static void test_noted_hashes(void **state) {
    (void)state;
    for (int form = 0; form < 8; form++) {
        char *directory = disk_directory_of("noted", form), *found = checkpoint_in(directory, 5);
        bool spoils = form & 1, of_this_step = form & 2;
        struct job job = {single, .to = directory, .step = 5, .file_bytes = 1 << 30, .vocab_size = VOCABULARY_OF_BLOCKS};
        job.asynchronous = form & 4;
        job.expected_step = of_this_step ? 5 : 4;
        job.spoils = spoils;
        run_well(&job);
        assert_int_equal(checkpoint_verify(found), spoils && of_this_step ? STATUS_FORMAT : STATUS_OK);
        if (form < 2)
            load_in_place(directory, found);
        remove_all(directory);
        free(found);
        free(directory);
    }
}

/* What is changed after the call is not in it; a second save waits for the first or replaces it; a run that ends in the
 * middle leaves what was there. */
static void test_asynchronous(void **state) {
    (void)state;
    const struct layout_case wide = {2, 2, 1, 3};
    char *sync = directory_of("sync", 0), *expected = checkpoint_in(sync, 5);
    struct job plain = {wide, .to = sync, .step = 5, .file_bytes = 1 << 30};
    run_well(&plain);
    for (int course = SAVE_ONCE; course <= SAVE_AND_LEAVE; course++) {
        char *async = disk_directory_of("async", course), *found = checkpoint_in(async, 5),
             *second = checkpoint_in(async, 6);
        struct job job = {wide, .to = async, .step = 5, .file_bytes = 1 << 30, .asynchronous = true, .mutates = true};
        job.course = course;
        run_well(&job);
        bool has_first = course == SAVE_ONCE || course == SAVE_TWICE_WAITING;
        assert_int_equal(directory_exists(found), has_first);
        if (has_first)
            assert_same_checkpoint(expected, found);
        bool has_second = course == SAVE_TWICE_WAITING || course == SAVE_TWICE_REPLACING;
        assert_int_equal(directory_exists(second), has_second);
        if (has_second)
            assert_int_equal(checkpoint_verify(second), STATUS_OK);
        struct text_list names;
        assert_int_equal(directory_list(async, &names), STATUS_OK);
        assert_int_equal(names.count, has_first + has_second); /* no draft is left */
        assert_int_equal(job.published, 4 * (has_first + has_second));
        text_list_release(&names);
        remove_all(async);
        free(second);
        free(found);
        free(async);
    }
    remove_all(sync);
    free(expected);
    free(sync);
}

enum { FAULT_FILE_BYTES = 80000 }; /* two or three files */

/* ---- faults ------------------------------------------------------------------------------------------------------ */

struct fault {
    _Atomic int countdown;
    int error;
    bool all_later;
};

static int fail_at(void *context, enum file_operation operation, const char *path) {
    (void)path;
    struct fault *fault = context;
    int left = fault->countdown--;
    if (operation != FILE_WRITE && fault->error == FILE_FAULT_SHORT)
        return 0;
    return left == 0 || (fault->all_later && left < 0) ? fault->error : 0;
}

static void assert_loads(struct layout_case layout, const char *directory, int64_t oldest, bool newer) {
    struct job load = {layout, .from = directory};
    run_well(&load);
    assert_true(load.state.step == oldest || (newer && load.state.step == oldest + 1));
}

/* A save of step 2 with a failure point; whether it was reached. */
static bool fail_one_save(struct layout_case layout, const char *directory, int at, int error, bool all_later,
                          bool async) {
    struct job job = {layout, .to = directory, .step = 2, .file_bytes = FAULT_FILE_BYTES, .asynchronous = async};
    struct fault fault = {at, error, all_later};
    file_set_fault(fail_at, &fault);
    enum status status = run(&job);
    file_set_fault(NULL, NULL);
    bool reached = fault.countdown < 0;
    if (error == FILE_FAULT_SHORT)
        assert_int_equal(status, STATUS_OK); /* the rest is written */
    assert_loads(layout, directory, status == STATUS_OK ? 2 : 1, status != STATUS_OK);
    struct text_list names;
    assert_int_equal(directory_list(directory, &names), STATUS_OK);
    for (size_t i = 0; i < names.count && !all_later; i++)
        assert_null(strstr(names.items[i], ".tmp-"));
    text_list_release(&names);
    char *second = checkpoint_in(directory, 2);
    remove_all(second);
    free(second);
    return reached;
}

static void fail_operations(struct layout_case layout, int every, int error, bool all_later, bool asynchronous) {
    char *directory = directory_of("fault", 0);
    struct job first = {layout, .to = directory, .step = 1, .file_bytes = FAULT_FILE_BYTES};
    run_well(&first);
    static int turn;
    int at = turn++ % every;
    while (fail_one_save(layout, directory, at, error, all_later, asynchronous))
        at += every;
    assert_true(at > 60);
    remove_all(directory);
    free(directory);
}

/* Whichever operation fails on whichever rank, once or from then on: it is an error on all, none hangs, and the
 * checkpoint before it loads. */
static void test_every_operation_failing(void **state) {
    (void)state;
    static const int errors[] = {EIO, ENOSPC, FILE_FAULT_SHORT};
    const struct layout_case wide = {2, 2, 1, 3};
    for (int mode = 0; mode < 12; mode++) {
        fail_operations(single, EVERY_CASE, errors[mode % 3], mode % 2, mode >= 6);
        if (mode % 3 != 2) /* the same places, many times as often */
            fail_operations(wide, 17 + mode, errors[mode % 3], mode % 2, mode >= 6);
    }
}

/* An allocation that fails ends the save, or the process where it is a small one: never what was saved before. */
static _Atomic long allocations_left = -1; /* negative: all are given */

extern void *__libc_malloc(size_t bytes);
extern void *__libc_calloc(size_t count, size_t bytes);
extern void *__libc_realloc(void *memory, size_t bytes);

#if defined(__GLIBC__) && !defined(__SANITIZE_ADDRESS__)
#define COUNTS_ALLOCATIONS 1
static bool is_given(void) {
    return allocations_left < 0 || allocations_left-- > 0 || (allocations_left = 0);
}
void *malloc(size_t bytes) {
    return is_given() ? __libc_malloc(bytes) : NULL;
}
void *calloc(size_t count, size_t bytes) {
    return is_given() ? __libc_calloc(count, bytes) : NULL;
}
void *realloc(void *memory, size_t bytes) {
    return is_given() ? __libc_realloc(memory, bytes) : NULL;
}
#else
#define COUNTS_ALLOCATIONS 0
#endif

/* In a process of its own: a save of one rank that is given `count` allocations; whether that was enough. */
static bool save_with_allocations(const char *directory, long count) {
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        struct comm self = comm_self();
        struct job job = {single, .to = directory, .step = 2, .file_bytes = FAULT_FILE_BYTES};
        struct rank r = {0};
        freopen("/dev/null", "w", stderr);
        if (open_rank(&r, &job, &self) != STATUS_OK)
            _exit(2);
        fill(r.model, 1);
        allocations_left = count;
        enum status status = save(&r, &job);
        _exit(status == STATUS_OK ? 0 : 1);
    }
    int ended;
    alarm(10); /* a hang ends the test */
    assert_int_equal(waitpid(child, &ended, 0), child);
    alarm(0);
    assert_true(!WIFEXITED(ended) || WEXITSTATUS(ended) < 2);
    assert_true(!WIFSIGNALED(ended) || WTERMSIG(ended) == SIGABRT);
    return WIFEXITED(ended) && WEXITSTATUS(ended) == 0;
}

/* Every one of the first hundred, then every ninth. */
static void test_allocations_failing(void **state) {
    (void)state;
    if (!COUNTS_ALLOCATIONS)
        skip();
    char *directory = directory_of("memory", 0), *second = checkpoint_in(directory, 2);
    struct job first = {single, .to = directory, .step = 1, .file_bytes = FAULT_FILE_BYTES};
    run_well(&first);
    long count = 0;
    while (!save_with_allocations(directory, count)) {
        assert_loads(single, directory, 1, true);
        remove_all(second);
        count += count < 100 ? 1 : 9;
    }
    assert_true(count > 200);
    assert_loads(single, directory, 2, false);
    remove_all(directory);
    free(second);
    free(directory);
}

/* ---- damage ------------------------------------------------------------------------------------------------------ */

/* A checkpoint of another model is whole: not to be passed over as if it were damaged, and then written over. */
static void test_another_model(void **state) {
    (void)state;
    char *directory = directory_of("other", 0);
    struct job save_dense = {single, .to = directory, .step = 1, .file_bytes = 1 << 30, .dense = true};
    run_well(&save_dense);
    for (int ranks = 1; ranks <= 2; ranks++) {
        struct job load = {{1, ranks, 1, 3}, .from = directory};
        assert_int_equal(run(&load), STATUS_FORMAT);
        assert_non_null(strstr(status_text(), "does not fit this run"));
    }
    remove_all(directory);
    free(directory);
}

static void assert_found(const char *checkpoint, const char *path, uint64_t where) {
    if (checkpoint_verify(checkpoint) == STATUS_OK)
        fail_msg("%s: damage at %llu is not found", path, (unsigned long long)where);
}

/* By the ranks of another layout, each reading its own part. */
static void assert_not_resumed(const char *directory) {
    struct job load = {{1, 1, 1, 0}, .from = directory, .dense = true};
    for (int ranks = 1; ranks <= 3; ranks += 2) {
        load.layout.shard = ranks;
        assert_int_equal(run(&load), STATUS_NOT_FOUND);
    }
}

/* Nobody goes on from the model's file where it is rounded: it is checked all the same, whoever reads. */
static void test_damage_to_rounded_weights_is_found(void **state) {
    (void)state;
    static const char *const names[] = {"model.safetensors", "training/optimizer.safetensors", "training/state.json"};
    char *directory = directory_of("damage", 1), *checkpoint = checkpoint_in(directory, 1);
    struct job job = {{1, 2, 1, 3}, .to = directory, .step = 1, .file_bytes = 1 << 30, .dense = true, .rounded = true};
    run_well(&job);
    for (int n = 0; n < 3; n++) {
        char *path = path_join(checkpoint, names[n]);
        uint64_t size;
        assert_int_equal(file_size(path, &size), STATUS_OK);
        for (uint64_t i = 0; i < 40; i++) {
            uint64_t bit = random_bits(6, (uint64_t)n, i) % (8 * size);
            flip(path, bit);
            assert_found(checkpoint, path, bit);
            assert_not_resumed(directory);
            flip(path, bit);
        }
        free(path);
    }
    assert_int_equal(checkpoint_verify(checkpoint), STATUS_OK);
    remove_all(directory);
    free(checkpoint);
    free(directory);
}

/* Files that no rank reads rows of are checked on resume, too. */
static void damage_small_files(const char *directory, const char *checkpoint) {
    static const char *const names[] = {"config.json", "tokenizer.json", "training/state.json", "training/config.ini",
                                        "training/manifest.json"};
    for (int n = 0; n < 5; n++) {
        char *path = path_join(checkpoint, names[n]);
        flip(path, 20);
        assert_not_resumed(directory);
        flip(path, 20);
        free(path);
    }
    assert_int_equal(checkpoint_verify(checkpoint), STATUS_OK);
}

/* Every bit of the headers, 10,000 bits of the data, and every length that is a multiple of 4 KiB. (Every bit of the
 * manifest: publish_test.) */
static void test_damage_is_found(void **state) {
    (void)state;
    static const char *const names[] = {"model.safetensors", "training/optimizer.safetensors"};
    char *directory = directory_of("damage", 0), *checkpoint = checkpoint_in(directory, 1);
    struct job job = {{1, 2, 1, 3}, .to = directory, .step = 1, .file_bytes = 1 << 30, .dense = true};
    run_well(&job);
    for (int n = 0; n < 2; n++) {
        char *path = path_join(checkpoint, names[n]), *data;
        size_t size;
        assert_int_equal(file_read(path, 1 << 26, &data, &size), STATUS_OK);
        uint64_t header_bits = 8 * (8 + (uint64_t)(unsigned char)data[0] + 256 * (uint64_t)(unsigned char)data[1]);
        for (uint64_t i = 0; i < header_bits + 5000; i += EVERY_BIT) {
            uint64_t bit = i < header_bits ? i : random_bits(5, (uint64_t)n, i) % (8 * size);
            flip(path, bit);
            assert_found(checkpoint, path, bit);
            if (i % 997 == 0)
                assert_not_resumed(directory);
            flip(path, bit);
        }
        for (size_t cut = size - 1; cut > 0; cut = (cut - 1) / 4096 * 4096) {
            assert_int_equal(truncate(path, (off_t)cut), 0);
            assert_found(checkpoint, path, cut);
        }
        assert_int_equal(file_write(path, data, size), STATUS_OK);
        assert_int_equal(checkpoint_verify(checkpoint), STATUS_OK);
        free(data);
        free(path);
    }
    damage_small_files(directory, checkpoint);
    remove_all(directory);
    free(checkpoint);
    free(directory);
}

/* Several threads write and read what one does: each has a buffer of its own. Last, because threads do not live
 * through the fork of a test before. */
static void test_several_threads(void **state) {
    (void)state;
    char *one = disk_directory_of("one", 0), *canonical = checkpoint_in(one, 3);
    struct job first = {single, .to = one, .step = 3, .file_bytes = 3000};
    run_well(&first);
    threads_set_count(3);
    assert_int_equal(waiting_threads_count(), 6);
    for (int i = 0; i < 20; i++) {
        char *several = disk_directory_of("several", i), *saved = checkpoint_in(several, 3);
        struct job again = {layouts[i % 3], .from = one, .to = several, .step = 3, .file_bytes = 3000};
        run_well(&again);
        assert_same_checkpoint(canonical, saved);
        remove_all(several);
        free(saved);
        free(several);
    }
    threads_set_count(1);
    remove_all(one);
    free(canonical);
    free(one);
}

/* Which of the files were read while a checkpoint was loaded. */
struct reads {
    _Atomic bool weights_came, model_came_last;
};

/* The model's file comes when the weights in f32 have long been where they belong. */
static int read_model_last(void *context, enum file_operation operation, const char *path) {
    enum { TRIES = 500, TRY_US = 10000, DELIVERED_US = 50000 };
    struct reads *reads = context;
    if (operation == FILE_READ && strstr(path, "optimizer.safetensors"))
        reads->weights_came = true;
    if (operation == FILE_READ && strstr(path, "model.safetensors")) {
        for (int i = 0; i < TRIES && !reads->weights_came; i++)
            usleep(TRY_US);
        usleep(DELIVERED_US);
        reads->model_came_last = reads->weights_came;
    }
    return 0;
}

/* Rounded weights are checked and go nowhere, whenever they come. */
static void test_rounded_weights_go_nowhere(void **state) {
    (void)state;
    char *from = disk_directory_of("rounded", 0), *to = disk_directory_of("exact", 0), *saved = checkpoint_in(from, 3);
    char *again = checkpoint_in(to, 3);
    struct job save_rounded = {single, .to = from, .step = 3, .file_bytes = 1 << 30, .rounded = true};
    struct job load = {single, .from = from, .to = to, .step = 3, .file_bytes = 1 << 30, .rounded = true};
    struct reads reads = {0};
    run_well(&save_rounded);
    threads_set_count(3);
    file_set_fault(read_model_last, &reads);
    run_well(&load);
    file_set_fault(NULL, NULL);
    threads_set_count(1);
    assert_true(reads.model_came_last);
    assert_same_checkpoint(saved, again);
    remove_all(from);
    remove_all(to);
    free(saved), free(again), free(from), free(to);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_rounded_from_a_device),
        cmocka_unit_test(test_any_layout_to_any_other),
        cmocka_unit_test(test_every_byte_is_written_once),
        cmocka_unit_test(test_parts_begin_at_blocks),
        cmocka_unit_test(test_many_files),
        cmocka_unit_test(test_asynchronous),
        cmocka_unit_test(test_changed_while_it_is_written),
        cmocka_unit_test(test_noted_hashes),
        cmocka_unit_test(test_every_operation_failing),
        cmocka_unit_test(test_allocations_failing),
        cmocka_unit_test(test_another_model),
        cmocka_unit_test(test_damage_is_found),
        cmocka_unit_test(test_damage_to_rounded_weights_is_found),
        cmocka_unit_test(test_several_threads),
        cmocka_unit_test(test_rounded_weights_go_nowhere),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
