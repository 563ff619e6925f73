#include "parallel/balance.h"

#include "base/log.h"
#include "base/memory.h"
#include <stdlib.h>

static void take_counts(struct balance *b, int64_t expert_count, struct arena *arena) {
    for (int block = 0; block < b->block_count; block++)
        b->counts[block] = layer_take(arena, DTYPE_I32, b->comm->size, expert_count);
}

static enum status take_all(struct balance *b, const struct model *model) {
    size_t blocks = (size_t)b->block_count, ranks = (size_t)b->comm->size;
    struct arena counting;
    TRY(memory_alloc(&b->counts, blocks, sizeof *b->counts));
    TRY(memory_alloc(&b->requests, blocks, sizeof *b->requests));
    TRY(memory_alloc(&b->bytes, ranks, sizeof *b->bytes));
    TRY(memory_alloc(&b->offsets, ranks, sizeof *b->offsets));
    for (int r = 0; r < b->comm->size; r++) {
        b->bytes[r] = model->config.num_experts * (int64_t)dtype_size(DTYPE_I32);
        b->offsets[r] = r * b->bytes[r];
    }
    arena_init_counting(&counting);
    take_counts(b, model->config.num_experts, &counting);
    TRY(arena_init(&b->arena, model->device, counting.used));
    take_counts(b, model->config.num_experts, &b->arena);
    return STATUS_OK;
}

enum status balance_init(struct balance *b, const struct model *model, const struct workspace *w, struct comm *comm) {
    *b = (struct balance){.comm = comm};
    if (!tensor_exists(w->all_balance_counts) || comm->size == 1)
        return STATUS_OK;
    b->block_count = w->block_count;
    enum status status = take_all(b, model);
    if (status != STATUS_OK)
        balance_release(b);
    return status;
}

/* After a step that failed elsewhere counts may be under way still. */
void balance_release(struct balance *b) {
    for (int block = 0; b->requests && block < b->block_count; block++)
        if (b->comm->ops->wait(b->comm, &b->requests[block]) != STATUS_OK)
            log_verbose("counts of experts' rows ended with a rank gone");
    arena_release(&b->arena);
    free(b->counts);
    free(b->requests);
    free(b->bytes);
    free(b->offsets);
    *b = (struct balance){0};
}

enum status balance_start(struct balance *b, const struct workspace *w, int block) {
    if (!b->block_count)
        return STATUS_OK;
    return b->comm->ops->all_gather(b->comm, w->expert_count[block].data, b->counts[block].data, b->bytes, b->offsets,
                                    &b->requests[block]);
}

enum status balance_finish(struct balance *b, const struct model *model, struct workspace *w, int block) {
    if (!b->block_count)
        return STATUS_OK;
    TRY(b->comm->ops->wait(b->comm, &b->requests[block]));
    for (int r = 0; r < b->comm->size; r++)
        if (r != b->comm->rank)
            model->context.ops->add(tensor_rows(b->counts[block], r, 1), w->balance_count[block]);
    return STATUS_OK;
}
