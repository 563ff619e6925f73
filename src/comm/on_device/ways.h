/* The two ways of transfers between devices, for on_device.c alone. */
#pragma once

#include "comm/on_device/on_device.h"

/* Starts either collective: send_offsets of NULL: the same to everybody. */
typedef enum status on_device_start(struct comm *comm, const void *send, const int64_t *send_counts, const int64_t *send_offsets,
                                    void *recv, const int64_t *recv_counts, const int64_t *recv_offsets,
                                    struct comm_request *request);

/* The state of a communicator; comm->state. Both ways begin with it. */
struct on_device {
    struct comm_memory memory;
    on_device_start *start;
    struct comm host; /* comm->host points here */
};

/* What both ways have in common of the table: the two collectives by `start`, and parts. */
enum status on_device_all_gather(struct comm *comm, const void *send, void *recv, const int64_t *counts, const int64_t *offsets,
                                 struct comm_request *request) MUST_USE;
enum status on_device_all_to_all(struct comm *comm, const void *send, const int64_t *send_counts, const int64_t *send_offsets,
                                 void *recv, const int64_t *recv_counts, const int64_t *recv_offsets,
                                 struct comm_request *request) MUST_USE;
enum status on_device_split(struct comm *comm, int color, struct comm *part) MUST_USE;

/* What every start does first: checks, counts, and what a rank keeps for itself. send_offsets of NULL: the same to everybody. */
void on_device_keep_own(struct comm *comm, const void *send, const int64_t *send_counts, const int64_t *send_offsets, void *recv,
                        const int64_t *recv_counts, const int64_t *recv_offsets);

/* What `rank` gets of this one. */
struct on_device_piece {
    int64_t bytes, offset;
};
static inline struct on_device_piece on_device_piece_for(const struct comm *comm, int rank, const int64_t *send_counts,
                                                         const int64_t *send_offsets) {
    return (struct on_device_piece){send_counts[send_offsets ? rank : comm->rank], send_offsets ? send_offsets[rank] : 0};
}

enum status on_device_staged(struct comm *comm, struct comm_memory memory) MUST_USE;
enum status on_device_nccl(struct comm *comm, struct comm_memory memory) MUST_USE;

/* The version of NCCL on this machine, as 22703; STATUS_USAGE where there is none. */
enum status on_device_nccl_version(int *version) MUST_USE;
