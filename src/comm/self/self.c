#include "comm/comm.h"

static enum status self_all_reduce_sum(struct comm *comm, struct tensor t) {
    (void)comm;
    (void)t;
    return STATUS_OK;
}

static enum status self_agree(struct comm *comm, enum status mine) {
    (void)comm;
    return mine;
}

struct comm comm_self(void) {
    static const struct comm_ops self = {"self", self_all_reduce_sum, self_agree};
    return (struct comm){&self, 0, 1, NULL};
}
