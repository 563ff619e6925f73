#include "cli/common.h"

#include "base/threads.h"
#include <stdio.h>
#include <string.h>

enum status common_read_stdin(struct text *out) {
    char buffer[4096];
    size_t size;
    while ((size = fread(buffer, 1, sizeof buffer, stdin)) > 0)
        text_add(out, buffer, size);
    return ferror(stdin) ? status_fail(STATUS_IO, "cannot read text from standard input") : STATUS_OK;
}

/* auto, as in training: what multiplies faster. */
static enum status parse_precision(const struct model_flags *flags, const struct device *device, enum dtype *compute) {
    bool prefers_bf16 = strcmp(flags->kernels, "auto") == 0 && kernels_device_prefers_bf16(device);
    if (strcmp(flags->precision, "auto") == 0)
        *compute = prefers_bf16 ? DTYPE_BF16 : DTYPE_F32;
    else if (strcmp(flags->precision, "fp32") == 0)
        *compute = DTYPE_F32;
    else if (strcmp(flags->precision, "bf16") == 0)
        *compute = DTYPE_BF16;
    else
        return status_fail(STATUS_USAGE, "--precision is auto, fp32 or bf16, not \"%s\"", flags->precision);
    return STATUS_OK;
}

enum status common_load(const struct model_flags *flags, int64_t position_count, struct loaded_model *out) {
    struct load_options options = {.position_count = position_count};
    if (!flags->model)
        return status_fail(STATUS_USAGE, "--model DIR is missing");
    TRY(device_choose(flags->device, &options.device));
    TRY(parse_precision(flags, options.device, &options.compute));
    TRY(kernels_choose_for(options.device, flags->kernels, &options.ops));
    if (flags->threads < 0 || flags->threads > 4096)
        return status_fail(STATUS_USAGE, "--threads is 0 to 4096, not %lld", (long long)flags->threads);
    threads_set_count((int)flags->threads);
    return model_load(flags->model, options, out);
}
