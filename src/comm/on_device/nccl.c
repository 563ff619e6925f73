/* From device to device by NCCL. Invariants:
 *  1. Every communicator has a queue of its own beside the device's order, so that one transfer does not wait for another that has
 *     nothing to do with it; ranks ask for transfers in the same order, which is all that the library wants.
 *  2. A transfer is a group of sends and receives, one for each rank with which any byte passes; its mark stands behind it.
 *  3. The library's communicator is made by the first transfer, hence never for a group that exchanges nothing.
 *  4. Sums are not its business: they are made above, in rank order.
 */
#include "comm/on_device/ways.h"

#if defined(CADRE_CUDA) || defined(CADRE_CUDA_MODEL)

#include "base/memory.h"
#include "device/cuda/device_cuda.h"
#include <dlfcn.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- the library -------------------------------------------------------------------------------------------------------- */

/* What is used of its interface, release 2.7 and later. */
struct nccl_id {
    char bytes[128];
};
enum { NCCL_SUCCESS = 0, NCCL_IN_PROGRESS = 7, NCCL_UINT8 = 1, NCCL_LEAST_VERSION = 2700 };

struct nccl {
    int (*ncclGetVersion)(int *version);
    const char *(*ncclGetErrorString)(int code);
    int (*ncclGetUniqueId)(struct nccl_id *id);
    int (*ncclCommInitRank)(void **comm, int size, struct nccl_id id, int rank);
    int (*ncclCommDestroy)(void *comm);
    int (*ncclCommAbort)(void *comm);
    int (*ncclCommGetAsyncError)(void *comm, int *code);
    int (*ncclGroupStart)(void);
    int (*ncclGroupEnd)(void);
    int (*ncclSend)(const void *data, size_t count, int type, int peer, void *comm, void *queue);
    int (*ncclRecv)(void *data, size_t count, int type, int peer, void *comm, void *queue);
};

static struct nccl nccl;
static int nccl_version;
static char nccl_missing[160]; /* why it cannot be used; empty: it can */
static pthread_once_t nccl_once = PTHREAD_ONCE_INIT;

static void load_functions(void *library) {
    const struct {
        const char *name;
        void **function;
    } wanted[] = {
#define WANTED(name) {#name, (void **)&nccl.name}
        WANTED(ncclGetVersion),   WANTED(ncclGetErrorString), WANTED(ncclGetUniqueId),       WANTED(ncclCommInitRank),
        WANTED(ncclCommDestroy),  WANTED(ncclCommAbort),      WANTED(ncclCommGetAsyncError), WANTED(ncclGroupStart),
        WANTED(ncclGroupEnd),     WANTED(ncclSend),           WANTED(ncclRecv),
#undef WANTED
    };
    for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++) {
        *wanted[i].function = dlsym(library, wanted[i].name);
        if (!*wanted[i].function)
            snprintf(nccl_missing, sizeof nccl_missing, "its NCCL has no %s: it is too old", wanted[i].name);
    }
}

#ifdef CADRE_CUDA_MODEL
static const char usual_library[] = "libnccl_model.so"; /* tests/nccl; what is on the machine is for devices */
#else
static const char usual_library[] = "libnccl.so.2";
#endif

static void load(void) {
    const char *name = getenv("CADRE_NCCL");
    void *library = dlopen(name ? name : usual_library, RTLD_NOW | RTLD_LOCAL);
    if (!library)
        snprintf(nccl_missing, sizeof nccl_missing, "no NCCL on its machine: %.120s", dlerror());
    else
        load_functions(library);
    if (!*nccl_missing && (nccl.ncclGetVersion(&nccl_version) != NCCL_SUCCESS || nccl_version < NCCL_LEAST_VERSION))
        snprintf(nccl_missing, sizeof nccl_missing, "its NCCL is version %d: it is too old", nccl_version);
}

enum status on_device_nccl_version(int *version) {
    pthread_once(&nccl_once, load);
    if (*nccl_missing)
        return status_fail(STATUS_USAGE, "%s", nccl_missing);
    *version = nccl_version;
    return STATUS_OK;
}

static enum status check(int code) {
    if (code == NCCL_SUCCESS || code == NCCL_IN_PROGRESS)
        return STATUS_OK;
    return status_fail(STATUS_PEER, "NCCL: %s", nccl.ncclGetErrorString(code));
}

/* Where all ranks agree on it: it is no rank's being gone. */
static enum status check_beginning(int code, const char *what) {
    if (code == NCCL_SUCCESS)
        return STATUS_OK;
    return status_fail(STATUS_IO, "%s: %s; --run.transport host goes without NCCL", what, nccl.ncclGetErrorString(code));
}

/* ---- a communicator ----------------------------------------------------------------------------------------------------- */

struct passage { /* a transfer under way, or spare */
    struct passage *next;
    void *mark;
};

struct nccl_state {
    struct on_device base;
    void *comm;  /* of the library; NULL before the first transfer */
    void *queue;
    void *begin; /* a mark for the device's order */
    struct passage *spare;
    int under_way;
    bool broken;
};

/* Collective. */
static enum status meet(struct comm *comm) {
    struct nccl_state *s = comm->state;
    struct nccl_id id = {{0}};
    enum status status = STATUS_OK;
    if (comm->rank == 0)
        status = check_beginning(nccl.ncclGetUniqueId(&id), "ncclGetUniqueId");
    TRY(comm_agree(comm->host, status));
    TRY(comm_broadcast(comm->host, &id, sizeof id));
    s->queue = device_cuda_queue_open();
    s->begin = device_cuda_mark_make();
    status = check_beginning(nccl.ncclCommInitRank(&s->comm, comm->size, id, comm->rank), "ncclCommInitRank");
    if (status != STATUS_OK)
        s->comm = NULL;
    return comm_agree(comm->host, status);
}

static enum status take_passage(struct nccl_state *s, struct passage **out) {
    struct passage *passage = s->spare;
    if (passage) {
        s->spare = passage->next;
    } else {
        TRY(memory_alloc(&passage, 1, sizeof *passage));
        passage->mark = device_cuda_mark_make();
    }
    *out = passage;
    return STATUS_OK;
}

static void put_back(struct nccl_state *s, struct passage *passage) {
    passage->next = s->spare;
    s->spare = passage;
}

/* Each rank begins with its right neighbour, so that not all send to one. */
static int ask_all(const struct comm *comm, const char *send, const int64_t *send_counts, const int64_t *send_offsets, char *recv,
                   const int64_t *recv_counts, const int64_t *recv_offsets) {
    const struct nccl_state *s = comm->state;
    int code = nccl.ncclGroupStart();
    for (int i = 1; i < comm->size && code == NCCL_SUCCESS; i++) {
        int to = (comm->rank + i) % comm->size, from = (comm->rank + comm->size - i) % comm->size;
        struct on_device_piece piece = on_device_piece_for(comm, to, send_counts, send_offsets);
        if (piece.bytes > 0)
            code = nccl.ncclSend(send + piece.offset, (size_t)piece.bytes, NCCL_UINT8, to, s->comm, s->queue);
        if (recv_counts[from] > 0 && code == NCCL_SUCCESS)
            code = nccl.ncclRecv(recv + recv_offsets[from], (size_t)recv_counts[from], NCCL_UINT8, from, s->comm, s->queue);
    }
    int end = nccl.ncclGroupEnd();
    return code == NCCL_SUCCESS ? end : code;
}

static enum status start(struct comm *comm, const void *send, const int64_t *send_counts, const int64_t *send_offsets, void *recv,
                         const int64_t *recv_counts, const int64_t *recv_offsets, struct comm_request *request) {
    struct nccl_state *s = comm->state;
    struct passage *passage;
    *request = (struct comm_request){0};
    on_device_keep_own(comm, send, send_counts, send_offsets, recv, recv_counts, recv_offsets);
    if (comm->size == 1)
        return STATUS_OK;
    if (!s->comm) {
        struct comm_count count = comm->host->count;
        TRY(meet(comm));
        comm->host->count = count; /* what is exchanged is the same whichever way is taken */
    }
    TRY(take_passage(s, &passage));
    device_cuda_queue_follow(s->queue, s->begin);
    enum status status = check(ask_all(comm, send, send_counts, send_offsets, recv, recv_counts, recv_offsets));
    if (status != STATUS_OK) {
        s->broken = true;
        put_back(s, passage);
        return status;
    }
    device_cuda_queue_mark(s->queue, passage->mark);
    s->under_way++;
    request->ticket = (int64_t)(intptr_t)passage;
    return STATUS_OK;
}

/* A rank that is gone shows here at best; a kernel that waits for one keeps the device, and the watch over the ranks
 * (comm/launch) ends the process. */
static enum status nccl_wait(struct comm *comm, struct comm_request *request) {
    struct nccl_state *s = comm->state;
    struct passage *passage = (struct passage *)(intptr_t)request->ticket;
    int code = NCCL_SUCCESS;
    if (!passage)
        return STATUS_OK;
    *request = (struct comm_request){0};
    device_cuda_follow(passage->mark);
    s->under_way--;
    put_back(s, passage);
    enum status status = check(nccl.ncclCommGetAsyncError(s->comm, &code));
    if (status == STATUS_OK)
        status = check(code);
    s->broken = s->broken || status != STATUS_OK;
    return status;
}

static void nccl_release(struct comm *comm) {
    struct nccl_state *s = comm->state;
    CHECK(s->under_way == 0 || s->broken);
    if (s->comm && s->broken) {
        nccl.ncclCommAbort(s->comm);
    } else if (s->comm) {
        device_cuda_queue_finish(s->queue);
        nccl.ncclCommDestroy(s->comm);
    }
    if (s->queue)
        device_cuda_queue_close(s->queue);
    while (s->spare) {
        struct passage *passage = s->spare;
        s->spare = passage->next;
        device_cuda_mark_free(passage->mark);
        free(passage);
    }
    if (s->begin)
        device_cuda_mark_free(s->begin);
    comm_release(&s->base.host);
    free(s);
}

static const struct comm_ops nccl_ops = {"nccl",    on_device_all_gather, on_device_all_to_all,
                                         nccl_wait, on_device_split,      nccl_release};

enum status on_device_nccl(struct comm *comm, struct comm_memory memory) {
    struct nccl_state *s;
    int version;
    TRY(on_device_nccl_version(&version));
    TRY(memory_alloc(&s, 1, sizeof *s));
    *s = (struct nccl_state){.base = {memory, start, *comm}};
    *comm = (struct comm){.ops = &nccl_ops, .rank = comm->rank, .size = comm->size, .state = s, .host = &s->base.host};
    return STATUS_OK;
}

#else

enum status on_device_nccl_version(int *version) {
    (void)version;
    return status_fail(STATUS_USAGE, "this program was built without CUDA");
}

enum status on_device_nccl(struct comm *comm, struct comm_memory memory) {
    int version;
    (void)comm, (void)memory;
    return on_device_nccl_version(&version);
}

#endif
