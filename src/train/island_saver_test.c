/* Checkpoints of runs with islands: any number of islands, or none, from any other, and nothing damaged unnoticed. */
#include "train/saver.h"

#include "base/memory.h"
#include "base/random.h"
#include "comm/threads/comm_threads.h"
#include "model/names.h"
#include "train/checkpoint_testing.h"
#include "train/shares.h"
#include <math.h>

enum { STEP = 3, SMALL_FILE_BYTES = 9000, LARGE_FILE_BYTES = 1 << 30 };

static const struct outer_plan test_plan = {40, 3, 2, OUTER_SEQUENTIAL, 7, 5};
static const struct outer_report test_report = {2, 1LL << 40, 0.1, NAN, 1.0 / 3, 5e-320, 1e22, INT64_MAX};

struct island_layout {
    int islands /* 0: none */, replicate, shard, expert, zero;
};

/* What the ranks of a layout are to do. */
struct job {
    struct island_layout layout;
    const char *from, *to; /* directories of checkpoints; from NULL: the run has just begun */
    int64_t from_islands;
    enum checkpoint_read read;
    uint64_t file_bytes;
    bool asynchronous, rounded;
};

/* ---- ranks with a model and what islands hold besides ------------------------------------------------------------ */

struct rank {
    struct ranks ranks;
    struct model *model;
    struct outer outer, *islands; /* islands: the outer, or NULL */
    struct saver *saver;
    struct tokenizer *tokenizer;
};

static void free_arrays(struct tensor *arrays, int count) {
    for (int i = 0; i < count && arrays; i++)
        free(arrays[i].data);
    free(arrays);
}

static void close_rank(struct rank *r) {
    int rows = r->model ? r->model->table.count : 0;
    saver_destroy(r->saver);
    tokenizer_destroy(r->tokenizer);
    free_arrays(r->outer.global, rows);
    free_arrays(r->outer.momentum, rows);
    model_destroy(r->model);
    ranks_close(&r->ranks);
}

/* As own_weight, in memory of its own. */
static enum status take_arrays(const struct model *model, struct tensor **arrays) {
    TRY(memory_alloc(arrays, (size_t)model->table.count, sizeof **arrays));
    for (int i = 0; i < model->table.count; i++) {
        (*arrays)[i] = model->own_weight[i];
        TRY(memory_alloc(&(*arrays)[i].data, tensor_bytes(model->own_weight[i]) + 1, 1));
    }
    return STATUS_OK;
}

static enum status open_outer(struct rank *r) {
    r->islands = &r->outer;
    r->outer = (struct outer){.model = r->model, .ranks = &r->ranks, .options.plan = test_plan};
    TRY(take_arrays(r->model, &r->outer.global));
    return take_arrays(r->model, &r->outer.momentum);
}

static struct sharding sharding_of(struct island_layout l, int rank) {
    const int size[MESH_AXIS_COUNT] = {l.islands > 0 ? l.islands : 1, l.replicate, l.shard, l.expert};
    return (struct sharding){mesh_make(size, rank), l.zero};
}

static enum status open_parts(struct rank *r, const struct job *job) {
    struct saver_settings settings = {job->to, job->file_bytes, job->asynchronous, job->rounded, NULL};
    if (job->layout.islands > 0)
        TRY(open_outer(r));
    TRY(tokenizer_open(tokenizer_path, &r->tokenizer));
    return saver_create(&r->saver, r->model, r->islands, &r->ranks, &settings);
}

static enum status open_rank(struct rank *r, const struct job *job, struct comm *world) {
    struct sharding sharding = sharding_of(job->layout, world->rank);
    struct model_config config = small_config(false);
    const struct kernel_ops *ops;
    TRY(kernels_choose("portable", &ops));
    TRY(ranks_open(&r->ranks, &sharding.mesh, world, (struct comm_memory){0}));
    struct model_options options = {ops, device_cpu(), DTYPE_F32, DTYPE_F32, 16, true, sharding};
    enum status status = model_create(&config, options, &r->model);
    if (status == STATUS_OK)
        status = open_parts(r, job);
    return comm_agree(world, status);
}

static int64_t island_of(const struct rank *r) {
    return r->ranks.mesh.coordinate[MESH_ISLAND];
}

/* ---- what stands in memory --------------------------------------------------------------------------------------- */

/* Numbers that say which array of which island they are of: GLOBAL and MOMENTUM of island 0 are those of all. */
enum content { GLOBAL, MOMENTUM, LOCAL, FIRST, SECOND, NOTHING, ZEROS };

static uint32_t content_bits(enum content content, int64_t island, int item, int64_t element) {
    uint64_t bits = random_bits((uint64_t)(8 * island + content), (uint64_t)item, (uint64_t)element);
    return content == ZEROS ? 0 : (uint32_t)bits & 0xBFFFFFFFu; /* finite */
}

/* Each element by its place in the whole, so that the layout does not show. Writes them, or counts those that differ.
 */
static int64_t visit(const struct model *model, const struct tensor *array, enum content content, int64_t island,
                     bool writes) {
    struct named_tensor *items;
    int count;
    int64_t wrong = 0;
    if (model_name_tensors(model, array, "", &items, &count) != STATUS_OK)
        return -1;
    for (int i = 0; i < count; i++) {
        struct tensor t = items[i].tensor;
        int64_t elements = tensor_elements(t), first = elements ? items[i].first_row * (elements / t.shape[0]) : 0;
        for (int64_t k = 0; k < elements; k++) {
            uint32_t bits = content_bits(content, island, i, first + k), *at = (uint32_t *)t.data + k;
            if (writes)
                *at = bits;
            wrong += *at != bits;
        }
    }
    free(items);
    return wrong;
}

static void fill_with(struct rank *r, enum content content) {
    struct tensor *arrays[] = {r->model->own_weight, r->model->moment1, r->model->moment2, r->outer.global,
                               r->outer.momentum};
    for (int a = 0; a < 5; a++)
        if (arrays[a])
            visit(r->model, arrays[a], content, 0, true);
}

/* A run that has islands: each is somewhere else. One that has none: where island 0 is, but with the global weights. */
static void fill_as_trained(struct rank *r) {
    const struct model *model = r->model;
    int64_t island = island_of(r);
    visit(model, model->own_weight, r->islands ? LOCAL : GLOBAL, island, true);
    visit(model, model->moment1, FIRST, island, true);
    visit(model, model->moment2, SECOND, island, true);
    if (!r->islands)
        return;
    visit(model, r->outer.global, GLOBAL, 0, true);
    visit(model, r->outer.momentum, MOMENTUM, 0, true);
}

static enum status expect(const struct rank *r, const char *what, const struct tensor *array, enum content content,
                          int64_t island) {
    int64_t wrong = visit(r->model, array, content, island, false);
    return wrong == 0 ? STATUS_OK
                      : status_fail(STATUS_NUMERIC, "rank %d: %lld elements of the %s are wrong", r->ranks.world->rank,
                                    (long long)wrong, what);
}

static enum status expect_tensors(const struct rank *r, int64_t from_islands) {
    const struct model *model = r->model;
    int64_t source = from_islands > 0 ? island_of(r) % from_islands : 0;
    bool goes_on = r->islands && from_islands > 0; /* else the global weights are where it begins */
    TRY(expect(r, "weights", model->own_weight, goes_on ? LOCAL : GLOBAL, goes_on ? source : 0));
    TRY(expect(r, "first moments", model->moment1, FIRST, source));
    TRY(expect(r, "second moments", model->moment2, SECOND, source));
    if (!r->islands)
        return STATUS_OK;
    TRY(expect(r, "global weights", r->outer.global, GLOBAL, 0));
    return expect(r, "outer momentum", r->outer.momentum, goes_on ? MOMENTUM : ZEROS, 0);
}

static struct guard guard_of(int64_t island) {
    struct guard guard = {.count = 3 + (int)island, .skipped_in_a_row = island, .rollbacks = 1, .furthest_step = 9};
    for (int i = 0; i < guard.count; i++) {
        guard.loss[i] = random_normal(1, (uint64_t)island, (uint64_t)i);
        guard.gradient_norm[i] = random_normal(2, (uint64_t)island, (uint64_t)i);
    }
    return guard;
}

static bool same_report(const struct outer_report *a, const struct outer_report *b) {
    return a->fragment == b->fragment && a->sent_step == b->sent_step && a->gradient_norm == b->gradient_norm &&
           isnan(a->cosine) && isnan(b->cosine) && a->flushed == b->flushed && a->loss == b->loss &&
           a->sent_bytes == b->sent_bytes;
}

static enum status expect_state(const struct rank *r, const struct train_state *state, int64_t from_islands) {
    struct guard guard = guard_of(from_islands > 0 ? island_of(r) % from_islands : 0);
    struct outer_plan plan = from_islands > 0 ? test_plan : (struct outer_plan){0};
    if (state->step != STEP || state->sequences != 24 || state->tokens != 384 || state->best_step != 2 ||
        state->best_valid_loss != 0.1)
        return status_fail(STATUS_NUMERIC, "the state is of step %lld", (long long)state->step);
    if (memcmp(&state->guard, &guard, sizeof guard) != 0)
        return status_fail(STATUS_NUMERIC, "rank %d: the guard is another island's", r->ranks.world->rank);
    if (state->form.island_count != from_islands || !outer_plan_equal(&state->plan, &plan))
        return status_fail(STATUS_NUMERIC, "%lld islands, or their plan, are wrong",
                           (long long)state->form.island_count);
    if (state->has_report != (from_islands > 0) || (state->has_report && !same_report(&state->report, &test_report)))
        return status_fail(STATUS_NUMERIC, "the report of what was received is wrong");
    return STATUS_OK;
}

/* ---- saving and resuming ----------------------------------------------------------------------------------------- */

static enum status save(struct rank *r, const struct job *job) {
    struct guard guards[8];
    for (int i = 0; i < 8; i++)
        guards[i] = guard_of(i);
    struct checkpoint_sources sources = {
        .tokenizer_path = tokenizer_path,
        .config_path = config_path,
        .model = &r->model->config,
        .tokenizer = r->tokenizer,
        .state = {STEP, 8 * STEP, 128 * STEP, 0.1, 2, .guard = guards[0], .has_report = true, .report = test_report},
        .keep = {9, 0, -1, -1},
        .island_guards = r->islands && r->ranks.world->rank == 0 ? guards : NULL,
    };
    TRY(saver_start(r->saver, &sources));
    if (job->asynchronous) { /* what is saved is what stood there */
        saver_detach(r->saver);
        fill_with(r, NOTHING);
    }
    return saver_finish(r->saver);
}

static enum status resume(struct rank *r, const struct job *job) {
    struct train_state state;
    char path[CHECKPOINT_PATH_BYTES];
    fill_with(r, NOTHING); /* whatever is not read shows */
    TRY(checkpoint_resume(job->from, r->model, r->islands, &r->ranks, job->read, &state, path));
    if (!*path)
        return status_fail(STATUS_NOT_FOUND, "no good checkpoint");
    enum status status = expect_tensors(r, job->from_islands);
    if (status == STATUS_OK)
        status = expect_state(r, &state, job->from_islands);
    return comm_agree(r->ranks.world, status);
}

static enum status run_rank(void *context, struct comm *world) {
    const struct job *job = context;
    struct rank r = {.model = NULL};
    enum status status = open_rank(&r, job, world);
    if (status == STATUS_OK && job->from)
        status = resume(&r, job);
    else if (status == STATUS_OK)
        fill_as_trained(&r);
    if (status == STATUS_OK && job->to)
        status = save(&r, job);
    close_rank(&r);
    return status;
}

static int rank_count(struct island_layout l) {
    return (l.islands > 0 ? l.islands : 1) * l.replicate * l.shard * l.expert;
}

static enum status run(struct job job) {
    return comm_threads_run(rank_count(job.layout), run_rank, &job);
}

static void run_well(struct job job) {
    struct island_layout l = job.layout;
    if (run(job) != STATUS_OK)
        fail_msg("from %lld islands into %d x %d x %d x %d, stage %d: %s", (long long)job.from_islands, l.islands,
                 l.replicate, l.shard, l.expert, l.zero, status_text());
}

/* ---- any to any -------------------------------------------------------------------------------------------------- */

static const struct island_layout layouts[] = {{0, 1, 1, 1, 0}, {0, 2, 1, 2, 3}, {1, 1, 1, 1, 0}, {1, 1, 2, 1, 3},
                                               {2, 1, 2, 1, 3}, {2, 2, 1, 1, 1}, {2, 1, 1, 2, 2}, {2, 2, 2, 1, 3},
                                               {3, 1, 1, 1, 0}, {3, 2, 1, 1, 3}, {3, 1, 1, 2, 3}, {4, 1, 2, 1, 2}};
enum { LAYOUT_COUNT = sizeof layouts / sizeof *layouts };

/* Checkpoints of some numbers of islands are rounded, so that both kinds are read by every layout. */
static bool is_rounded(struct island_layout l) {
    return l.islands % 2 == 1;
}

/* What layout b reads of `from` is right, and what it saves is `saved`, where it has as many islands. */
static void check_pair(int a, int b, const char *from, const char *saved) {
    char *to = directory_of("b", b), *again = checkpoint_in(to, STEP);
    bool alike = layouts[a].islands == layouts[b].islands;
    run_well((struct job){layouts[b], from, alike ? to : NULL, layouts[a].islands,
                          (a + b) % 2 ? CHECKPOINT_READ_BROADCAST : CHECKPOINT_READ_EACH, SMALL_FILE_BYTES, b % 2,
                          is_rounded(layouts[b])});
    if (alike) {
        assert_same_checkpoint(saved, again);
        remove_all(to);
    }
    free(again);
    free(to);
}

/* All 144 pairs. Of as many islands all layouts save the same files, byte for byte. */
static void test_any_to_any(void **state) {
    (void)state;
    char *first = NULL; /* saved by the first layout of so many islands */
    for (int a = 0; a < LAYOUT_COUNT; a++) {
        char *from = directory_of("a", a), *saved = checkpoint_in(from, STEP);
        run_well((struct job){layouts[a], .to = from, .file_bytes = SMALL_FILE_BYTES, .asynchronous = a % 2,
                              .rounded = is_rounded(layouts[a])});
        if (a == 0 || layouts[a].islands != layouts[a - 1].islands) {
            free(first);
            first = memory_copy_string(saved);
        }
        assert_same_checkpoint(first, saved);
        for (int b = a % EVERY_CASE; b < LAYOUT_COUNT; b += EVERY_CASE)
            check_pair(a, b, from, saved);
        free(saved);
        free(from);
    }
    free(first);
    for (int a = 0; a < LAYOUT_COUNT; a++) {
        char *from = directory_of("a", a);
        remove_all(from);
        free(from);
    }
}

/* Rounded by a run without islands, and read by those that have some; and rounded by two islands. */
static void test_rounded_without_islands(void **state) {
    (void)state;
    for (int a = 0; a < 2; a++) {
        struct island_layout from_layout =
            a ? (struct island_layout){2, 1, 2, 1, 3} : (struct island_layout){0, 2, 1, 2, 3};
        char *from = directory_of("rounded", a);
        run_well(
            (struct job){from_layout, .to = from, .file_bytes = SMALL_FILE_BYTES, .asynchronous = a, .rounded = true});
        for (int b = 0; b < LAYOUT_COUNT; b++)
            run_well((struct job){layouts[b], from, .from_islands = from_layout.islands, .read = b % 2});
        remove_all(from);
        free(from);
    }
}

/* With large files, whose names are those of the stems. */
static void test_files_of_islands(void **state) {
    (void)state;
    static const char *const names[] = {"model.safetensors", "training/outer.safetensors",
                                        "training/island-0.safetensors", "training/island-1.safetensors"};
    static const char *const others[] = {"training/optimizer.safetensors", "training/island-2.safetensors"};
    char *directory = directory_of("files", 0), *checkpoint = checkpoint_in(directory, STEP);
    run_well((struct job){{2, 1, 2, 1, 3}, .to = directory, .file_bytes = LARGE_FILE_BYTES});
    for (int i = 0; i < 6; i++) {
        char *path = path_join(checkpoint, i < 4 ? names[i] : others[i - 4]);
        assert_int_equal(file_exists(path), i < 4);
        free(path);
    }
    run_well((struct job){{3, 1, 1, 1, 0}, directory, .from_islands = 2});
    remove_all(directory);
    free(checkpoint);
    free(directory);
}

static struct shares shares_of(struct island_layout layout, int rank, struct model **model) {
    struct model_config config = small_config(false);
    const struct kernel_ops *ops;
    struct shares shares;
    assert_int_equal(kernels_choose("portable", &ops), STATUS_OK);
    struct model_options options = {ops, device_cpu(), DTYPE_F32, DTYPE_F32, 16, true, sharding_of(layout, rank)};
    assert_int_equal(model_create_shapes(&config, options, model), STATUS_OK);
    struct outer outer = {.global = (*model)->own_weight, .momentum = (*model)->own_weight};
    assert_int_equal(shares_init(&shares, *model, layout.islands > 0 ? &outer : NULL, false, SMALL_FILE_BYTES),
                     STATUS_OK);
    return shares;
}

/* Every byte of all files has one writer, and no rank has much more to write than the others. */
static void test_every_byte_is_written_once(void **state) {
    (void)state;
    for (int i = 0; i < LAYOUT_COUNT; i++) {
        uint64_t total = 0, most = 0, whole = 0, headers = 0;
        int ranks = rank_count(layouts[i]);
        for (int r = 0; r < ranks; r++) {
            struct model *model;
            struct shares shares = shares_of(layouts[i], r, &model);
            for (int f = 0; f < shares.set.file_count && r == 0; f++)
                headers += shares.set.plans[f].header_bytes;
            uint64_t data = shares.bytes - (r == 0 ? headers : 0);
            total += shares.bytes;
            whole = sharded_bytes(&shares.set);
            most = data > most ? data : most;
            shares_release(&shares);
            model_destroy(model);
        }
        assert_int_equal(total, whole);
        if (layouts[i].expert == 1) /* whole experts are uneven otherwise */
            assert_true((double)most < 1.2 * (double)(whole - headers) / ranks);
    }
}

static void test_island_of_a_file(void **state) {
    (void)state;
    assert_int_equal(checkpoint_island_of_file("training/island-0.safetensors"), 0);
    assert_int_equal(checkpoint_island_of_file("training/island-12-00003-of-00007.safetensors"), 12);
    assert_int_equal(checkpoint_island_of_file("training/island-7.safetensors.index.json"), 7);
    assert_int_equal(checkpoint_island_of_file("training/island-.safetensors"), -1);
    assert_int_equal(checkpoint_island_of_file("training/island--3.safetensors"), -1);
    assert_int_equal(checkpoint_island_of_file("training/outer.safetensors"), -1);
    assert_int_equal(checkpoint_island_of_file("island-1.safetensors"), -1);
    assert_true(checkpoint_island_of_file("training/island-99999999999999999999") > 65536);
}

/* ---- damage ------------------------------------------------------------------------------------------------------ */

/* By as many islands, fewer, more and none, alone and with others. */
static void assert_not_resumed(const char *directory, const char *name, uint64_t where) {
    static const struct island_layout readers[] = {{3, 1, 1, 1, 0}, {3, 2, 1, 1, 3}, {1, 1, 1, 1, 0}, {2, 1, 2, 1, 3},
                                                   {4, 2, 1, 1, 1}, {0, 1, 1, 1, 0}, {0, 2, 1, 2, 3}};
    static size_t turn; /* each reader meets every kind of damage, under the sanitizers of some files only */
    for (size_t i = turn++ % EVERY_CASE; i < sizeof readers / sizeof *readers; i += EVERY_CASE) {
        struct job job = {readers[i], directory, .from_islands = 3};
        job.read = where % 2 ? CHECKPOINT_READ_BROADCAST : CHECKPOINT_READ_EACH;
        enum status status = run(job);
        if (status != STATUS_NOT_FOUND)
            fail_msg("%s: damage at bit %llu is not found by reader %zu: %s", name, (unsigned long long)where, i,
                     status_text());
    }
}

/* Of a header a bit that nobody would miss, so that only a hash can tell: in {"format": "pt"}. */
static uint64_t quiet_bit(const char *path) {
    char *data;
    size_t size;
    assert_int_equal(file_read(path, 1 << 26, &data, &size), STATUS_OK);
    const char *found = memmem(data, size, "\"pt\"", 4);
    uint64_t bit = found ? 8 * (uint64_t)(found + 1 - data) : 21;
    free(data);
    return bit;
}

/* In the header, and in the data. */
static void damage_file(const char *directory, const char *checkpoint, const struct checkpoint_file *file) {
    char *path = path_join(checkpoint, file->name);
    const uint64_t bits[] = {quiet_bit(path), 4 * file->bytes, 8 * file->bytes - 1};
    for (int i = 0; i < 3; i++) {
        flip(path, bits[i]);
        assert_not_resumed(directory, file->name, bits[i]);
        flip(path, bits[i]);
    }
    char *aside = text_format("%s.aside", path);
    assert_int_equal(rename(path, aside), 0);
    assert_not_resumed(directory, file->name, 0);
    assert_int_equal(rename(aside, path), 0);
    free(aside);
    free(path);
}

/* In any file, also of what the islands that resume do not read. */
static void test_damage_is_found(void **state) {
    (void)state;
    static const uint64_t file_bytes[] = {LARGE_FILE_BYTES, 60000};
    for (int n = 0; n < 2; n++) {
        struct checkpoint_manifest manifest;
        char *directory = directory_of("damage", n), *checkpoint = checkpoint_in(directory, STEP);
        run_well((struct job){{3, 1, 2, 1, 3}, .to = directory, .file_bytes = file_bytes[n]});
        assert_int_equal(checkpoint_manifest_open(&manifest, checkpoint), STATUS_OK);
        assert_true(n == 0 || manifest.file_count > 16);
        for (size_t i = 0; i < manifest.file_count; i++)
            damage_file(directory, checkpoint, &manifest.files[i]);
        checkpoint_manifest_close(&manifest);
        run_well((struct job){{3, 1, 2, 1, 3}, directory, .from_islands = 3});
        remove_all(directory);
        free(checkpoint);
        free(directory);
    }
}

/* A checkpoint that is whole and holds files of an island that it does not speak of is read; damaged there it is not.
 */
static void test_files_that_nobody_reads(void **state) {
    (void)state;
    char *directory = directory_of("more", 0), *checkpoint = checkpoint_in(directory, STEP);
    char *stray = path_join(checkpoint, "training/island-1-00009-of-00009.safetensors");
    struct checkpoint_draft draft;
    run_well((struct job){{2, 1, 1, 1, 0}, .to = directory, .file_bytes = LARGE_FILE_BYTES});
    assert_int_equal(checkpoint_begin(&draft, directory, STEP + 1), STATUS_OK);
    assert_int_equal(directory_remove(draft.path), STATUS_OK);
    assert_int_equal(rename(checkpoint, draft.path), 0);
    char *stray_draft = path_join(draft.path, "training/island-1-00009-of-00009.safetensors");
    assert_int_equal(file_write(stray_draft, "stray", 5), STATUS_OK);
    assert_int_equal(checkpoint_commit(&draft, NULL), STATUS_OK);
    char *published = checkpoint_in(directory, STEP + 1);
    assert_int_equal(rename(published, checkpoint), 0);
    for (int islands = 0; islands <= 3; islands++) {
        struct job job = {{islands, 1, 1, 1, 0}, directory, .from_islands = 2};
        run_well(job);
        flip(stray, 9);
        assert_int_equal(run(job), STATUS_NOT_FOUND);
        flip(stray, 9);
    }
    remove_all(directory);
    free(stray);
    free(stray_draft);
    free(published);
    free(checkpoint);
    free(directory);
}

/* ---- what state.json may say ------------------------------------------------------------------------------------- */

#define GUARD                                                                                                          \
    "{\"losses\": [1.5], \"gradient_norms\": [2], \"skipped_in_a_row\": 0, \"rollbacks\": 0, \"furthest_step\": 0}"
#define PLAN(steps, fragments, blocks, order, overlap, experts)                                                        \
    "{\"sync_steps\": " #steps ", \"fragments\": " #fragments ", \"blocks\": " #blocks ", \"order\": " #order          \
    ", \"overlap_steps\": " #overlap ", \"experts_every\": " #experts "}"
#define GOOD_PLAN PLAN(100, 3, 2, "strided", 5, 1)

static enum status read_text(const char *members, struct train_state *state) {
    char *directory = directory_of("state", 0), *training = path_join(directory, "training");
    char *path = path_join(training, "state.json");
    char *text = text_format("{\"version\": 1, \"step\": 3, \"sequences\": 4, \"tokens\": 5%s}", members);
    assert_int_equal(directory_make(training), STATUS_OK);
    assert_int_equal(file_write(path, text, strlen(text)), STATUS_OK);
    enum status status = checkpoint_read_state(directory, state);
    if (status != STATUS_OK)
        assert_non_null(strstr(status_text(), path)); /* the line names the file */
    remove_all(directory);
    free(text);
    free(path);
    free(training);
    free(directory);
    return status;
}

static void test_states_that_are_refused(void **state) {
    (void)state;
    static const char *const wrong[] = {
        ", \"islands\": [" GUARD "]",
        ", \"outer\": " GOOD_PLAN,
        ", \"guard\": " GUARD ", \"outer\": " GOOD_PLAN,
        ", \"islands\": [], \"outer\": " GOOD_PLAN,
        ", \"islands\": {}, \"outer\": " GOOD_PLAN,
        ", \"islands\": 2, \"outer\": " GOOD_PLAN,
        ", \"islands\": null, \"outer\": " GOOD_PLAN,
        ", \"islands\": [1], \"outer\": " GOOD_PLAN,
        ", \"islands\": [null], \"outer\": " GOOD_PLAN,
        ", \"islands\": [{}], \"outer\": " GOOD_PLAN,
        ", \"islands\": [" GUARD ", {}], \"outer\": " GOOD_PLAN,
        ", \"islands\": [" GUARD "], \"outer\": []",
        ", \"islands\": [" GUARD "], \"outer\": {}",
        ", \"islands\": [" GUARD "], \"outer\": null",
        ", \"islands\": [" GUARD "], \"outer\": " PLAN(-1, 3, 2, "strided", 5, 1),
        ", \"islands\": [" GUARD "], \"outer\": " PLAN(9223372036854775807, 3, 2, "strided", 5, 1),
        ", \"islands\": [" GUARD "], \"outer\": " PLAN(100, 0, 2, "strided", 5, 1),
        ", \"islands\": [" GUARD "], \"outer\": " PLAN(100, 4, 2, "strided", 5, 1),
        ", \"islands\": [" GUARD "], \"outer\": " PLAN(100, 4294967297, 2, "strided", 5, 1),
        ", \"islands\": [" GUARD "], \"outer\": " PLAN(100, 1.5, 2, "strided", 5, 1),
        ", \"islands\": [" GUARD "], \"outer\": " PLAN(2, 3, 2, "strided", 0, 1),
        ", \"islands\": [" GUARD "], \"outer\": " PLAN(100, 3, 0, "strided", 5, 1),
        ", \"islands\": [" GUARD "], \"outer\": " PLAN(100, 3, 2, "sideways", 5, 1),
        ", \"islands\": [" GUARD "], \"outer\": " PLAN(100, 3, 2, 0, 5, 1),
        ", \"islands\": [" GUARD "], \"outer\": " PLAN(100, 3, 2, "strided", -1, 1),
        ", \"islands\": [" GUARD "], \"outer\": " PLAN(100, 3, 2, "strided", 33, 1),
        ", \"islands\": [" GUARD "], \"outer\": " PLAN(100, 3, 2, "strided", 5, 0),
        ", \"islands\": [" GUARD "], \"outer\": " PLAN(0, 1, 2, "strided", 0, 1),
    };
    struct train_state read;
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++)
        if (read_text(wrong[i], &read) != STATUS_FORMAT)
            fail_msg("taken for good: %s", wrong[i]);
    assert_int_equal(read_text(", \"islands\": [" GUARD "], \"outer\": " PLAN(100, 3, 2, "strided", 32, 1), &read),
                     STATUS_OK);
    assert_int_equal(read.form.island_count, 1);
    assert_int_equal(read.guard.count, 1);
    assert_int_equal(read_text("", &read), STATUS_OK); /* of a version that knew of neither guards nor islands */
    assert_int_equal(read.form.island_count, 0);
    assert_int_equal(read.guard.count, 0);
}

static void test_the_most_islands(void **state) {
    (void)state;
    for (int count = 65536; count <= 65537; count++) {
        struct text members = {0};
        struct train_state read;
        text_add_string(&members, ", \"islands\": [" GUARD);
        for (int i = 1; i < count; i++)
            text_add_string(&members, "," GUARD);
        text_add_string(&members, "], \"outer\": " GOOD_PLAN);
        assert_int_equal(read_text(text_string(&members), &read), count == 65536 ? STATUS_OK : STATUS_FORMAT);
        text_release(&members);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_any_to_any),
        cmocka_unit_test(test_rounded_without_islands),
        cmocka_unit_test(test_files_of_islands),
        cmocka_unit_test(test_every_byte_is_written_once),
        cmocka_unit_test(test_island_of_a_file),
        cmocka_unit_test(test_damage_is_found),
        cmocka_unit_test(test_files_that_nobody_reads),
        cmocka_unit_test(test_states_that_are_refused),
        cmocka_unit_test(test_the_most_islands),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
