#include "model/names.h"

#include "base/memory.h"
#include <stdio.h>

struct named_tensor model_file_part(const struct sharding *sharding, const struct parameter *row, int64_t index,
                                    struct tensor own) {
    struct layout layout = sharding_own_layout(sharding, row);
    struct parameter_part part = sharding_part(sharding, row, &layout);
    struct named_tensor item = {.tensor = own, .first_row = part.first[0], .whole_rows = row->shape[0]};
    if (!row->is_expert) {
        item.tensor.dim_count = row->dim_count;
        for (int dim = 0; dim < 3; dim++)
            item.tensor.shape[dim] = part.shape[dim];
        return item;
    }
    int64_t local = index - part.first[0];
    bool held = local >= 0 && local < part.shape[0];
    item.first_row = part.first[1];
    item.whole_rows = row->shape[1];
    item.tensor = tensor_make(NULL, own.dtype, 2, held ? part.shape[1] : 0, part.shape[2], 1);
    if (held && own.data)
        item.tensor.data = (char *)own.data + (size_t)(local * part.shape[1] * part.shape[2]) * dtype_size(own.dtype);
    return item;
}

enum status model_name_tensors(const struct model *model, const struct tensor *array, const char *prefix,
                               struct named_tensor **items, int *count) {
    const struct parameter_table *table = &model->table;
    int64_t total = 0;
    for (int i = 0; i < table->count; i++)
        total += parameter_file_tensors(&table->rows[i]);
    TRY(memory_alloc(items, (size_t)total, sizeof **items));
    *count = 0;
    for (int i = 0; i < table->count; i++) {
        const struct parameter *row = &table->rows[i];
        for (int64_t part = 0; part < parameter_file_tensors(row); part++) {
            struct named_tensor *item = &(*items)[(*count)++];
            char name[PARAMETER_NAME_BYTES];
            parameter_file_name(row, part, name);
            int size = snprintf(item->name, sizeof item->name, "%s%s", prefix, name);
            CHECK(size > 0 && (size_t)size < sizeof item->name);
            struct named_tensor held = model_file_part(&model->sharding, row, part, array[i]);
            item->tensor = held.tensor;
            item->first_row = held.first_row;
            item->whole_rows = held.whole_rows;
        }
    }
    return STATUS_OK;
}
