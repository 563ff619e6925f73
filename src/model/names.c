#include "model/names.h"

#include "base/memory.h"
#include <stdio.h>

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
            item->tensor = row->is_expert ? tensor_slice(array[i], part) : array[i];
        }
    }
    return STATUS_OK;
}
