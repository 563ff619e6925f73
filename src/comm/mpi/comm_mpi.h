/* The transport over MPI; opened by comm/launch, which also says what these promise. */
#pragma once

#include "comm/launch/launch.h"

enum status comm_mpi_open(int expected_size, const char *starter, void (*lost)(const char *line), struct comm_launch *out)
    MUST_USE;
void comm_mpi_set_timeout(struct comm_launch *launch, double limit_s);
void comm_mpi_close(struct comm_launch *launch, enum status status);
bool comm_mpi_speaks(struct comm_launch *launch, enum status status);
void comm_mpi_library(char *buffer, size_t bytes);
enum status comm_mpi_bare(struct comm_launch *launch, const void *send, const int64_t *send_counts,
                          const int64_t *send_offsets, void *recv, const int64_t *recv_counts,
                          const int64_t *recv_offsets) MUST_USE;
