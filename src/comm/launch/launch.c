#include "comm/launch/launch.h"

#include "base/threads.h"
#include <stdio.h>
#include <stdlib.h>
#ifdef CADRE_MPI
#include "comm/mpi/comm_mpi.h"
#include "comm/mpi/watch.h"
#endif

/* What the environment says of how many were started. */
struct starter {
    int size;
    bool speaks_mpi; /* it set up what MPI needs to find the others */
    const char *name;
};

static int number_of(const char *name) {
    const char *text = getenv(name);
    return text ? atoi(text) : 0;
}

static struct starter find_starter(void) {
    if (getenv("OMPI_COMM_WORLD_RANK"))
        return (struct starter){number_of("OMPI_COMM_WORLD_SIZE"), true, "mpirun of Open MPI"};
    if (getenv("PMI_RANK"))
        return (struct starter){number_of("PMI_SIZE"), true, "mpirun (PMI)"};
    if (getenv("SLURM_STEP_ID") && getenv("SLURM_PROCID")) /* a batch script's own commands have no step */
        return (struct starter){number_of("SLURM_STEP_NUM_TASKS"), getenv("PMIX_RANK") != NULL, "srun"};
    if (getenv("PMIX_RANK")) /* how many is not in the environment of every such starter: MPI knows */
        return (struct starter){number_of("PMIX_SIZE"), true, "a starter that speaks PMIx"};
    return (struct starter){1, false, "hand"};
}

enum status comm_launch_open(struct comm_launch *out, void (*lost)(const char *line)) {
    struct starter starter = find_starter();
    *out = (struct comm_launch){.world = comm_self(), .local_size = 1, .thread_count = threads_available()};
    if (starter.size == 1 || (starter.size <= 0 && !starter.speaks_mpi))
        return STATUS_OK;
    if (!starter.speaks_mpi)
        return status_fail(STATUS_USAGE, "%s started %d processes that cannot find each other; ask for MPI: srun --mpi=pmix",
                           starter.name, starter.size);
#ifdef CADRE_MPI
    return comm_mpi_open(starter.size, starter.name, lost, out);
#else
    (void)lost;
    return status_fail(STATUS_USAGE, "%s started several processes, but this program is built without MPI; install it, "
                       "configure with -DCADRE_MPI=ON and build again, or start a single process", starter.name);
#endif
}

void comm_launch_set_timeout(struct comm_launch *launch, double limit_s) {
    (void)limit_s;
#ifdef CADRE_MPI
    if (launch->state)
        comm_mpi_set_timeout(launch, limit_s);
#endif
    (void)launch;
}

void comm_launch_note_termination(void) {
#ifdef CADRE_MPI
    watch_note_termination();
#endif
}

bool comm_launch_speaks(struct comm_launch *launch, enum status status) {
#ifdef CADRE_MPI
    if (launch->state)
        return comm_mpi_speaks(launch, status);
#endif
    (void)launch;
    return status != STATUS_OK;
}

void comm_launch_close(struct comm_launch *launch, enum status status) {
    (void)status;
#ifdef CADRE_MPI
    if (launch->state)
        comm_mpi_close(launch, status);
#endif
    *launch = (struct comm_launch){0};
}

const char *comm_launch_library(char *buffer, size_t bytes) {
#ifdef CADRE_MPI
    comm_mpi_library(buffer, bytes);
#else
    snprintf(buffer, bytes, "without MPI: one process only");
#endif
    return buffer;
}

enum status comm_launch_bare(struct comm_launch *launch, const void *send, const int64_t *send_counts,
                             const int64_t *send_offsets, void *recv, const int64_t *recv_counts,
                             const int64_t *recv_offsets) {
#ifdef CADRE_MPI
    if (launch->state)
        return comm_mpi_bare(launch, send, send_counts, send_offsets, recv, recv_counts, recv_offsets);
#endif
    (void)launch, (void)send, (void)send_counts, (void)send_offsets, (void)recv, (void)recv_counts, (void)recv_offsets;
    return status_fail(STATUS_USAGE, "there is no MPI to compare with: start several ranks with mpirun");
}
