#include "comm/comm.h"

#include "base/memory.h"
#include <stdlib.h>
#include <string.h>

enum { MESSAGE_BYTES = 1024 };

enum status comm_share(struct comm *of, const void *mine, size_t bytes, void *all) {
    struct comm *comm = comm_host(of);
    int64_t *counts;
    struct comm_request request;
    TRY(memory_alloc(&counts, 2 * (size_t)comm->size, sizeof *counts));
    int64_t *offsets = counts + comm->size;
    for (int r = 0; r < comm->size; r++) {
        counts[r] = (int64_t)bytes;
        offsets[r] = r * (int64_t)bytes;
    }
    enum status status = comm->ops->all_gather(comm, mine, all, counts, offsets, &request);
    free(counts);
    TRY(status);
    return comm->ops->wait(comm, &request);
}

/* What ranks tell each other: a status and, where it is a failure, the line that says what happened. */
struct verdict {
    int32_t status;
    char text[MESSAGE_BYTES];
};

enum status comm_agree(struct comm *comm, enum status mine) {
    if (comm->size == 1)
        return mine;
    struct verdict own = {.status = mine}, *all;
    if (mine != STATUS_OK)
        strncpy(own.text, status_text(), sizeof own.text - 1);
    TRY(memory_alloc(&all, (size_t)comm->size, sizeof *all));
    enum status status = comm_share(comm, &own, sizeof own, all);
    int worst = 0;
    for (int r = 1; r < comm->size && status == STATUS_OK; r++)
        if (all[r].status > all[worst].status)
            worst = r;
    if (status == STATUS_OK && all[worst].status != STATUS_OK) {
        status = (enum status)all[worst].status;
        if (mine != status)
            status = status_fail(status, "rank %d: %s", worst, all[worst].text);
    }
    free(all);
    return status;
}

enum status comm_sum_f64(struct comm *comm, double *values, int count) {
    if (comm->size == 1)
        return STATUS_OK;
    double *all;
    TRY(memory_alloc(&all, (size_t)comm->size * (size_t)count, sizeof *all));
    enum status status = comm_share(comm, values, (size_t)count * sizeof *values, all);
    for (int i = 0; i < count && status == STATUS_OK; i++) {
        double sum = 0;
        for (int r = 0; r < comm->size; r++)
            sum += all[(size_t)r * (size_t)count + (size_t)i];
        values[i] = sum;
    }
    free(all);
    return status;
}

enum status comm_broadcast(struct comm *of, void *data, size_t bytes) {
    struct comm *comm = comm_host(of);
    if (comm->size == 1)
        return STATUS_OK;
    int64_t *counts;
    char *copy;
    struct comm_request request;
    TRY(memory_alloc(&counts, 2 * (size_t)comm->size, sizeof *counts));
    enum status status = memory_alloc(&copy, bytes ? bytes : 1, 1);
    if (status == STATUS_OK) {
        counts[0] = (int64_t)bytes;
        status = comm->ops->all_gather(comm, data, copy, counts, counts + comm->size, &request);
        if (status == STATUS_OK)
            status = comm->ops->wait(comm, &request);
        if (status == STATUS_OK)
            memcpy(data, copy, bytes);
        free(copy);
    }
    free(counts);
    return status;
}

void comm_release(struct comm *comm) {
    if (comm->ops)
        comm->ops->release(comm);
    *comm = (struct comm){0};
}
