/* For tests: kernels that do one thing wrong each, which the model of a device has to find. */
#pragma once

#include <stdbool.h>

struct model_fault {
    const char *what;
    const char *told; /* of the line that the program ends with */
};

/* The first is none; what is NULL ends them. */
const struct model_fault *model_faults(void);

/* Runs the kernel of the number-th fault once, as it should be or with it. False where its results are wrong. */
bool model_fault_run(int number, bool wrong);
