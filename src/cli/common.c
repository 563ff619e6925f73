#include "cli/common.h"

#include "base/threads.h"
#include <string.h>

static enum status parse_precision(const char *precision, enum dtype *compute) {
    if (strcmp(precision, "fp32") == 0)
        *compute = DTYPE_F32;
    else if (strcmp(precision, "bf16") == 0)
        *compute = DTYPE_BF16;
    else
        return status_fail(STATUS_USAGE, "--precision is fp32 or bf16, not \"%s\"", precision);
    return STATUS_OK;
}

enum status common_load(const struct model_flags *flags, int64_t position_count, struct loaded_model *out) {
    struct load_options options = {.position_count = position_count};
    if (!flags->model)
        return status_fail(STATUS_USAGE, "--model DIR is missing");
    TRY(parse_precision(flags->precision, &options.compute));
    TRY(device_choose(flags->device, &options.device));
    TRY(kernels_choose_for(options.device, flags->kernels, &options.ops));
    threads_set_count((int)flags->threads);
    return model_load(flags->model, options, out);
}
