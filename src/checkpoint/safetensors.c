#include "checkpoint/safetensors.h"

#include "base/json.h"
#include "base/memory.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { LENGTH_BYTES = 8, HEADER_BYTES_MAX = 100000000, WRITE_CHUNK_BYTES = 4 << 20 };

static const struct {
    const char *name;
    int bytes;
} dtypes[SAFETENSORS_DTYPE_COUNT] = {
    {"F64", 8}, {"F32", 4}, {"F16", 2}, {"BF16", 2}, {"I64", 8},  {"I32", 4},     {"I16", 2},    {"I8", 1},
    {"U64", 8}, {"U32", 4}, {"U16", 2}, {"U8", 1},   {"BOOL", 1}, {"F8_E4M3", 1}, {"F8_E5M2", 1},
};

const char *safetensors_dtype_name(enum safetensors_dtype dtype) {
    return dtypes[dtype].name;
}

int64_t safetensors_elements(const struct safetensors_entry *entry) {
    int64_t elements = 1;
    for (int i = 0; i < entry->dim_count; i++)
        elements *= entry->shape[i];
    return elements;
}

/* ---- reading the header ------------------------------------------------------------------------------------------ */

static enum status fail(const char *path, const char *name, const char *what) {
    return status_fail(STATUS_FORMAT, "%s: tensor \"%.100s\": %s", path, name, what);
}

static enum status read_dtype(const char *path, const char *name, const json_t *member, enum safetensors_dtype *out) {
    const char *text = json_string_value(member);
    for (int i = 0; text && i < SAFETENSORS_DTYPE_COUNT; i++)
        if (strcmp(text, dtypes[i].name) == 0) {
            *out = (enum safetensors_dtype)i;
            return STATUS_OK;
        }
    if (!text)
        return fail(path, name, "\"dtype\" is missing");
    return status_fail(STATUS_FORMAT, "%s: tensor \"%.100s\": dtype \"%.20s\" is not known", path, name, text);
}

/* Shape, and from it the bytes that the tensor must have. */
static enum status read_shape(const char *path, struct safetensors_entry *entry, const json_t *shape, uint64_t *bytes) {
    if (!json_is_array(shape) || json_array_size(shape) > SAFETENSORS_DIMS_MAX)
        return fail(path, entry->name, "\"shape\" is not a list of at most 8 sizes");
    entry->dim_count = (int)json_array_size(shape);
    *bytes = (uint64_t)dtypes[entry->dtype].bytes;
    for (int i = 0; i < entry->dim_count; i++) {
        const json_t *dim = json_array_get(shape, (size_t)i);
        if (!json_is_integer(dim) || json_integer_value(dim) < 0)
            return fail(path, entry->name, "a size in \"shape\" is not a whole number of at least 0");
        entry->shape[i] = json_integer_value(dim);
        if (__builtin_mul_overflow(*bytes, (uint64_t)entry->shape[i], bytes) || *bytes > INT64_MAX)
            return fail(path, entry->name, "\"shape\" is too large");
    }
    return STATUS_OK;
}

static enum status read_offsets(const char *path, struct safetensors_entry *entry, const json_t *offsets,
                                uint64_t bytes) {
    const json_t *begin = json_array_get(offsets, 0), *end = json_array_get(offsets, 1);
    if (json_array_size(offsets) != 2 || !json_is_integer(begin) || !json_is_integer(end) ||
        json_integer_value(begin) < 0 || json_integer_value(end) < json_integer_value(begin))
        return fail(path, entry->name, "\"data_offsets\" is not [begin, end]");
    entry->begin = (uint64_t)json_integer_value(begin);
    entry->end = (uint64_t)json_integer_value(end);
    if (entry->end - entry->begin != bytes)
        return fail(path, entry->name, "\"data_offsets\" do not fit shape and dtype");
    return STATUS_OK;
}

static enum status read_entry(struct safetensors *file, const char *name, const json_t *value) {
    struct safetensors_entry *entry = &file->entries[file->entry_count++];
    entry->name = memory_copy_string(name);
    uint64_t bytes = 0;
    if (!json_is_object(value))
        return fail(file->path, name, "is not an object");
    TRY(read_dtype(file->path, name, json_object_get(value, "dtype"), &entry->dtype));
    TRY(read_shape(file->path, entry, json_object_get(value, "shape"), &bytes));
    return read_offsets(file->path, entry, json_object_get(value, "data_offsets"), bytes);
}

static int compare_offsets(const void *a, const void *b) {
    const struct safetensors_entry *x = a, *y = b;
    if (x->begin != y->begin)
        return x->begin < y->begin ? -1 : 1;
    return x->end < y->end ? -1 : x->end > y->end;
}

static int compare_names(const void *a, const void *b) {
    return strcmp(((const struct safetensors_entry *)a)->name, ((const struct safetensors_entry *)b)->name);
}

/* The data must be covered exactly: no hole, no overlap, nothing behind the last tensor. */
static enum status check_cover(struct safetensors *file, uint64_t data_bytes) {
    uint64_t position = 0;
    if (file->entry_count)
        qsort(file->entries, (size_t)file->entry_count, sizeof *file->entries, compare_offsets);
    for (int i = 0; i < file->entry_count; i++) {
        if (file->entries[i].begin != position)
            return fail(file->path, file->entries[i].name, "leaves a hole in the data or overlaps another tensor");
        position = file->entries[i].end;
    }
    if (position != data_bytes)
        return status_fail(STATUS_FORMAT, "%s: the header speaks of %llu bytes of data, the file has %llu", file->path,
                           (unsigned long long)position, (unsigned long long)data_bytes);
    if (file->entry_count)
        qsort(file->entries, (size_t)file->entry_count, sizeof *file->entries, compare_names);
    return STATUS_OK;
}

static enum status read_entries(struct safetensors *file, json_t *header) {
    const char *name;
    json_t *value;
    if (!json_is_object(header))
        return status_fail(STATUS_FORMAT, "%s: the header is not a JSON object", file->path);
    TRY(memory_alloc(&file->entries, json_object_size(header), sizeof *file->entries));
    json_object_foreach(header, name, value) {
        if (strcmp(name, "__metadata__") != 0)
            TRY(read_entry(file, name, value));
    }
    return STATUS_OK;
}

static enum status read_header(struct safetensors *file) {
    uint64_t size = file->map.size, header_bytes = 0;
    if (size < LENGTH_BYTES)
        return status_fail(STATUS_FORMAT, "%s: too short for a safetensors file (%llu bytes)", file->path,
                           (unsigned long long)size);
    for (int i = 0; i < LENGTH_BYTES; i++)
        header_bytes |= (uint64_t)file->map.data[i] << 8 * i;
    if (header_bytes > HEADER_BYTES_MAX || header_bytes > size - LENGTH_BYTES)
        return status_fail(STATUS_FORMAT, "%s: not a safetensors file, or cut short: its header would have %llu bytes",
                           file->path, (unsigned long long)header_bytes);
    json_t *header;
    TRY(json_parse(file->path, (const char *)file->map.data + LENGTH_BYTES, header_bytes, &header));
    enum status status = read_entries(file, header);
    json_decref(header);
    TRY(status);
    file->data = file->map.data + LENGTH_BYTES + header_bytes;
    return check_cover(file, size - LENGTH_BYTES - header_bytes);
}

enum status safetensors_open(struct safetensors *file, const char *path) {
    *file = (struct safetensors){.path = memory_copy_string(path)};
    enum status status = file_map_open(&file->map, path);
    if (status == STATUS_OK)
        status = read_header(file);
    if (status != STATUS_OK)
        safetensors_close(file);
    return status;
}

void safetensors_close(struct safetensors *file) {
    for (int i = 0; i < file->entry_count; i++)
        free(file->entries[i].name);
    free(file->entries);
    free(file->path);
    file_map_close(&file->map);
    *file = (struct safetensors){0};
}

struct safetensors_entry *safetensors_find(const struct safetensors *file, const char *name) {
    int low = 0, high = file->entry_count;
    while (low < high) {
        int middle = low + (high - low) / 2, order = strcmp(name, file->entries[middle].name);
        if (order == 0)
            return &file->entries[middle];
        if (order < 0)
            high = middle;
        else
            low = middle + 1;
    }
    return NULL;
}

/* ---- reading data -------------------------------------------------------------------------------------------------- */

static double half_to_double(uint16_t bits) {
    int exponent = bits >> 10 & 31, fraction = bits & 1023;
    double value = exponent == 0    ? ldexp(fraction, -24)
                   : exponent == 31 ? (fraction ? NAN : INFINITY)
                                    : ldexp(1024 + fraction, exponent - 25);
    return bits & 0x8000 ? -value : value;
}

/* Tensors in a file need not be aligned, so values are copied out. */
static double load_value(enum safetensors_dtype dtype, const unsigned char *at) {
    double wide;
    float single;
    uint16_t half;
    switch (dtype) {
    case SAFETENSORS_F64:
        memcpy(&wide, at, sizeof wide);
        return wide;
    case SAFETENSORS_F32:
        memcpy(&single, at, sizeof single);
        return single;
    case SAFETENSORS_F16:
        memcpy(&half, at, sizeof half);
        return half_to_double(half);
    default:
        memcpy(&half, at, sizeof half);
        return bf16_to_float(half);
    }
}

static void store_value(enum dtype dtype, void *host, int64_t index, double value) {
    if (dtype == DTYPE_F64)
        ((double *)host)[index] = value;
    else if (dtype == DTYPE_F32)
        ((float *)host)[index] = (float)value;
    else
        ((uint16_t *)host)[index] = float_to_bf16((float)value);
}

static bool same_dtype(enum safetensors_dtype file, enum dtype tensor) {
    return (file == SAFETENSORS_F32 && tensor == DTYPE_F32) || (file == SAFETENSORS_BF16 && tensor == DTYPE_BF16) ||
           (file == SAFETENSORS_F64 && tensor == DTYPE_F64) || (file == SAFETENSORS_I32 && tensor == DTYPE_I32);
}

enum status safetensors_read(const struct safetensors *file, const struct safetensors_entry *entry, int64_t first,
                             int64_t count, enum dtype to, void *host) {
    CHECK(first >= 0 && count >= 0 && first + count <= safetensors_elements(entry));
    int bytes = dtypes[entry->dtype].bytes;
    const unsigned char *from = file->data + entry->begin + (uint64_t)first * (uint64_t)bytes;
    if (same_dtype(entry->dtype, to)) {
        memcpy(host, from, (size_t)count * (size_t)bytes);
        return STATUS_OK;
    }
    if (entry->dtype > SAFETENSORS_BF16 || to == DTYPE_I32)
        return status_fail(STATUS_FORMAT, "%s: tensor \"%s\" is %s and cannot be read as %s", file->path, entry->name,
                           dtypes[entry->dtype].name, dtype_name(to));
    for (int64_t i = 0; i < count; i++)
        store_value(to, host, i, load_value(entry->dtype, from + i * bytes));
    return STATUS_OK;
}

/* ---- writing --------------------------------------------------------------------------------------------------------- */

static enum safetensors_dtype file_dtype(enum dtype dtype) {
    static const enum safetensors_dtype map[DTYPE_COUNT] = {SAFETENSORS_F32, SAFETENSORS_BF16, SAFETENSORS_F64,
                                                            SAFETENSORS_I32};
    return map[dtype];
}

/* Widest dtype first, then by name: the order of the reference writer, which keeps every tensor aligned. */
static int compare_items(const void *a, const void *b) {
    const struct named_tensor *x = *(const struct named_tensor *const *)a, *y = *(const struct named_tensor *const *)b;
    size_t x_size = dtype_size(x->tensor.dtype), y_size = dtype_size(y->tensor.dtype);
    if (x_size != y_size)
        return x_size > y_size ? -1 : 1;
    return strcmp(x->name, y->name);
}

static char *make_header(const struct named_tensor *const *order, int count) {
    json_t *header = json_object();
    json_object_set_new(header, "__metadata__", json_pack("{s:s}", "format", "pt"));
    json_int_t position = 0;
    for (int i = 0; i < count; i++) {
        const struct tensor *t = &order[i]->tensor;
        json_t *shape = json_array();
        for (int d = 0; d < t->dim_count; d++)
            json_array_append_new(shape, json_integer(t->shape[d]));
        json_int_t end = position + (json_int_t)tensor_bytes(*t);
        CHECK(json_object_get(header, order[i]->name) == NULL);
        json_object_set_new(header, order[i]->name,
                            json_pack("{s:s,s:o,s:[I,I]}", "dtype", dtypes[file_dtype(t->dtype)].name, "shape", shape,
                                      "data_offsets", position, end));
        position = end;
    }
    char *text = json_dumps(header, JSON_COMPACT | JSON_PRESERVE_ORDER);
    json_decref(header);
    CHECK(text != NULL);
    return text;
}

static enum status write_header(struct file_writer *writer, const char *json) {
    struct text header = {0};
    size_t size = strlen(json), padded = (size + 7) / 8 * 8;
    for (int i = 0; i < LENGTH_BYTES; i++) {
        char byte = (char)(padded >> 8 * i & 0xFF);
        text_add(&header, &byte, 1);
    }
    text_printf(&header, "%s%*s", json, (int)(padded - size), "");
    enum status status = file_writer_add(writer, header.data, header.size);
    text_release(&header);
    return status;
}

static enum status write_tensor(struct file_writer *writer, struct tensor t, const struct device *device,
                                char *buffer) {
    size_t bytes = tensor_bytes(t);
    for (size_t done = 0; done < bytes; done += WRITE_CHUNK_BYTES) {
        size_t part = bytes - done < WRITE_CHUNK_BYTES ? bytes - done : WRITE_CHUNK_BYTES;
        device->copy_to_host(buffer, (const char *)t.data + done, part);
        TRY(file_writer_add(writer, buffer, part));
    }
    return STATUS_OK;
}

static enum status write_all(struct file_writer *writer, const struct named_tensor *const *order, int count,
                             const struct device *device) {
    char *json = make_header(order, count), *buffer;
    enum status status = write_header(writer, json);
    free(json);
    TRY(status);
    TRY(memory_alloc(&buffer, WRITE_CHUNK_BYTES, 1));
    for (int i = 0; i < count && status == STATUS_OK; i++)
        status = write_tensor(writer, order[i]->tensor, device, buffer);
    free(buffer);
    TRY(status);
    return file_writer_flush(writer);
}

enum status safetensors_write(const char *path, const struct named_tensor *items, int count,
                              const struct device *device) {
    const struct named_tensor **order;
    TRY(memory_alloc(&order, (size_t)count, sizeof *order));
    for (int i = 0; i < count; i++)
        order[i] = &items[i];
    if (count)
        qsort(order, (size_t)count, sizeof *order, compare_items);
    struct file_writer writer;
    enum status status = file_writer_open(&writer, path, false);
    if (status == STATUS_OK) {
        status = write_all(&writer, order, count, device);
        enum status closed = file_writer_close(&writer);
        status = status == STATUS_OK ? closed : status;
    }
    free(order);
    return status;
}
