/* The router's operations touch E numbers a token: the reference is fast enough for them, so nothing is overridden. */
#include "kernels/cpu/isa/lanes.h"

#include "kernels/cpu/fillers.h"

void ISA_NAME(router_fill)(struct kernel_ops *ops) {
    (void)ops;
}
