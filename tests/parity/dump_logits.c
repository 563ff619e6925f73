/* Logits of a model for a row of token ids, as raw f32 [count, V] in a file: for comparison with other programs.
 *   dump_logits MODEL_DIR OUT_FILE ID ID ID ... */
#include "base/file.h"
#include "infer/load.h"
#include "model/block.h"

#include <stdio.h>
#include <stdlib.h>

static enum status run(const char *directory, const char *out, const int32_t *ids, int64_t count) {
    struct loaded_model loaded;
    struct workspace *w;
    struct load_options options = {.compute = DTYPE_F32, .position_count = count};
    TRY(kernels_choose("auto", &options.ops));
    TRY(model_load(directory, options, &loaded));
    int64_t positions = loaded.model->config.max_position_embeddings;
    if (count > positions) {
        loaded_model_release(&loaded);
        return status_fail(STATUS_USAGE, "%s takes at most %lld ids, not %lld", directory, (long long)positions, (long long)count);
    }
    TRY(workspace_create(loaded.model, (struct workspace_options){1, count, false, false}, &w));
    device_cpu()->copy_from_host(w->ids.data, ids, (size_t)count * sizeof *ids);
    model_embed_forward(loaded.model, w);
    for (int block = 0; block < w->block_count; block++)
        TRY(block_forward(loaded.model, w, block, NULL, false));
    int64_t vocab = loaded.model->config.vocab_size;
    float *logits = calloc((size_t)(count * vocab), sizeof *logits);
    if (!logits)
        return status_fail(STATUS_MEMORY, "no memory");
    model_logits(loaded.model, w, count, tensor_2d(logits, DTYPE_F32, count, vocab));
    enum status status = file_write(out, logits, (size_t)(count * vocab) * sizeof *logits);
    free(logits);
    workspace_destroy(w);
    loaded_model_release(&loaded);
    return status;
}

int main(int argc, char **argv) {
    int32_t ids[4096];
    int64_t count = 0;
    if (argc < 4 || argc > 4096)
        return 2;
    for (int i = 3; i < argc; i++)
        ids[count++] = atoi(argv[i]);
    if (run(argv[1], argv[2], ids, count) == STATUS_OK)
        return 0;
    fprintf(stderr, "dump_logits: %s\n", status_text());
    return 1;
}
