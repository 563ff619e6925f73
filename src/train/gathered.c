#include "train/gathered.h"

#include "base/memory.h"
#include "checkpoint/safetensors.h"
#include "model/names.h"
#include <stdlib.h>
#include <string.h>

/* One tensor of the file: where it stands in the table, and what this rank holds of it. */
struct piece {
    struct named_tensor item;
    int row;
    int64_t index; /* of the file tensors of that row */
};

struct gathering {
    const struct model *model;
    struct ranks *ranks;
    struct piece *pieces; /* sorted by name, which is the order of the file: one dtype only */
    int count;
    int64_t *counts; /* send, its offsets, receive, its offsets: 4 x ranks */
    void *buffer;    /* the largest tensor; rank 0 of the world only */
};

static int compare_pieces(const void *a, const void *b) {
    return strcmp(((const struct piece *)a)->item.name, ((const struct piece *)b)->item.name);
}

static enum status list_pieces(struct gathering *g, const struct gathered_array *arrays, int array_count) {
    const struct parameter_table *table = &g->model->table;
    int64_t per_array = 0;
    for (int i = 0; i < table->count; i++)
        per_array += parameter_file_tensors(&table->rows[i]);
    TRY(memory_alloc(&g->pieces, (size_t)(per_array * array_count), sizeof *g->pieces));
    for (int a = 0; a < array_count; a++) {
        struct named_tensor *items;
        int count, at = 0;
        TRY(model_name_tensors(g->model, arrays[a].own, arrays[a].prefix, &items, &count));
        for (int row = 0; row < table->count; row++)
            for (int64_t index = 0; index < parameter_file_tensors(&table->rows[row]); index++)
                g->pieces[g->count++] = (struct piece){items[at++], row, index};
        free(items);
    }
    qsort(g->pieces, (size_t)g->count, sizeof *g->pieces, compare_pieces);
    return STATUS_OK;
}

/* The mesh as rank `member` of the group `shards` of the first replica sees it. */
static struct sharding sharding_of(const struct gathering *g, int member) {
    struct sharding sharding = g->model->sharding;
    sharding.mesh.coordinate[MESH_ISLAND] = sharding.mesh.coordinate[MESH_REPLICATE] = 0;
    sharding.mesh.coordinate[MESH_SHARD] = member / sharding.mesh.size[MESH_EXPERT];
    sharding.mesh.coordinate[MESH_EXPERT] = member % sharding.mesh.size[MESH_EXPERT];
    return sharding;
}

/* Rows of a piece that `member` sends, and where they begin; none where a lower rank holds the same. */
static struct named_tensor part_of(const struct gathering *g, const struct piece *piece, int member) {
    struct sharding sharding = sharding_of(g, member);
    const struct parameter *row = &g->model->table.rows[piece->row];
    struct layout own = sharding_own_layout(&sharding, row);
    struct tensor none = tensor_1d(NULL, piece->item.tensor.dtype, 0);
    struct named_tensor part = model_file_part(&sharding, row, piece->index, none);
    for (int axis = MESH_SHARD; axis < MESH_AXIS_COUNT; axis++)
        if (own.axis[axis].kind == PLACEMENT_REPLICATE && sharding.mesh.coordinate[axis] > 0)
            part.tensor.shape[0] = 0;
    return part;
}

/* One piece to rank 0 of the group, whole in its buffer. */
static enum status gather_piece(struct gathering *g, const struct piece *piece) {
    struct comm *comm = &g->ranks->shards;
    int size = comm->size;
    int64_t *send = g->counts, *send_at = send + size, *recv = send_at + size, *recv_at = recv + size;
    struct comm_request request;
    memset(g->counts, 0, 4 * (size_t)size * sizeof *g->counts);
    send[0] = (int64_t)tensor_bytes(part_of(g, piece, comm->rank).tensor);
    for (int r = 0; comm->rank == 0 && r < size; r++) {
        struct named_tensor part = part_of(g, piece, r);
        struct tensor whole = named_tensor_whole(&part);
        int64_t row_bytes = (int64_t)tensor_bytes(whole) / (part.whole_rows > 0 ? part.whole_rows : 1);
        recv[r] = (int64_t)tensor_bytes(part.tensor);
        recv_at[r] = part.first_row * row_bytes;
    }
    TRY(comm->ops->all_to_all(comm, piece->item.tensor.data, send, send_at, g->buffer, recv, recv_at, &request));
    return comm->ops->wait(comm, &request);
}

static enum status take_memory(struct gathering *g) {
    size_t most = 1;
    for (int i = 0; i < g->count; i++) {
        size_t bytes = tensor_bytes(named_tensor_whole(&g->pieces[i].item));
        most = bytes > most ? bytes : most;
    }
    TRY(memory_alloc(&g->counts, 4 * (size_t)g->ranks->shards.size, sizeof *g->counts));
    return mesh_rank(&g->ranks->mesh) == 0 ? memory_alloc(&g->buffer, most, 1) : STATUS_OK;
}

/* The writer of rank 0, which goes on taking part after it failed. */
struct output {
    struct safetensors_writer writer;
    struct named_tensor *wholes;
    bool is_open;
    enum status status;
};

static void open_output(struct output *out, const struct gathering *g, const char *path) {
    out->status = memory_alloc(&out->wholes, (size_t)g->count, sizeof *out->wholes);
    for (int i = 0; i < g->count && out->status == STATUS_OK; i++) {
        out->wholes[i] = g->pieces[i].item;
        out->wholes[i].tensor = named_tensor_whole(&g->pieces[i].item);
    }
    if (out->status == STATUS_OK)
        out->status = safetensors_writer_open(&out->writer, path, out->wholes, g->count, NULL, 0);
    out->is_open = out->status == STATUS_OK;
}

static void add_to_output(struct output *out, const struct gathering *g, int index) {
    size_t bytes = tensor_bytes(out->status == STATUS_OK ? out->wholes[index].tensor : tensor_none());
    if (out->status != STATUS_OK || bytes == 0)
        return;
    CHECK(safetensors_writer_next(&out->writer) == &out->wholes[index]);
    out->status = safetensors_writer_add(&out->writer, g->buffer, bytes);
}

static void close_output(struct output *out) {
    if (out->status == STATUS_OK)
        out->status = safetensors_writer_finish(&out->writer);
    if (out->is_open)
        safetensors_writer_close(&out->writer);
    free(out->wholes);
}

static enum status run(struct gathering *g, const char *path) {
    struct output out = {.status = STATUS_OK};
    if (g->ranks->mesh.coordinate[MESH_REPLICATE] > 0 || g->ranks->mesh.coordinate[MESH_ISLAND] > 0)
        return STATUS_OK; /* others hold the same */
    bool writes = mesh_rank(&g->ranks->mesh) == 0;
    if (writes)
        open_output(&out, g, path);
    enum status moved = STATUS_OK;
    for (int i = 0; i < g->count && moved == STATUS_OK; i++) {
        moved = gather_piece(g, &g->pieces[i]);
        if (writes && moved == STATUS_OK)
            add_to_output(&out, g, i);
    }
    out.status = moved != STATUS_OK ? moved : out.status; /* what did not arrive cannot be finished */
    if (writes)
        close_output(&out);
    return out.status;
}

enum status gathered_write(const char *path, const struct model *model, struct ranks *ranks,
                           const struct gathered_array *arrays, int array_count) {
    struct gathering g = {.model = model, .ranks = ranks};
    enum status status = list_pieces(&g, arrays, array_count);
    if (status == STATUS_OK)
        status = take_memory(&g);
    status = comm_agree(ranks->world, status);
    if (status == STATUS_OK) {
        status = run(&g, path);
        if (status != STATUS_PEER)
            status = comm_agree(ranks->world, status);
    }
    free(g.pieces);
    free(g.counts);
    free(g.buffer);
    return status;
}
