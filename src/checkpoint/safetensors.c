#include "checkpoint/safetensors.h"

#include "base/json.h"
#include "base/memory.h"
#include <stdlib.h>
#include <string.h>

enum { LENGTH_BYTES = 8, HEADER_BYTES_MAX = 100000000, WRITE_CHUNK_BYTES = 4 << 20 };

static const char METADATA[] = "__metadata__";

static const struct {
    const char *name;
    int bits;
} dtypes[SAFETENSORS_DTYPE_COUNT] = {
    [SAFETENSORS_F64] = {"F64", 64},
    [SAFETENSORS_F32] = {"F32", 32},
    [SAFETENSORS_F16] = {"F16", 16},
    [SAFETENSORS_BF16] = {"BF16", 16},
    [SAFETENSORS_I64] = {"I64", 64},
    [SAFETENSORS_I32] = {"I32", 32},
    [SAFETENSORS_I16] = {"I16", 16},
    [SAFETENSORS_I8] = {"I8", 8},
    [SAFETENSORS_U64] = {"U64", 64},
    [SAFETENSORS_U32] = {"U32", 32},
    [SAFETENSORS_U16] = {"U16", 16},
    [SAFETENSORS_U8] = {"U8", 8},
    [SAFETENSORS_BOOL] = {"BOOL", 8},
    [SAFETENSORS_F8_E4M3] = {"F8_E4M3", 8},
    [SAFETENSORS_F8_E5M2] = {"F8_E5M2", 8},
    [SAFETENSORS_F8_E8M0] = {"F8_E8M0", 8},
    [SAFETENSORS_F8_E4M3FNUZ] = {"F8_E4M3FNUZ", 8},
    [SAFETENSORS_F8_E5M2FNUZ] = {"F8_E5M2FNUZ", 8},
    [SAFETENSORS_C64] = {"C64", 64},
    [SAFETENSORS_F6_E2M3] = {"F6_E2M3", 6},
    [SAFETENSORS_F6_E3M2] = {"F6_E3M2", 6},
    [SAFETENSORS_F4] = {"F4", 4},
};

const char *safetensors_dtype_name(enum safetensors_dtype dtype) {
    return dtypes[dtype].name;
}

int safetensors_dtype_bits(enum safetensors_dtype dtype) {
    return dtypes[dtype].bits;
}

enum safetensors_dtype safetensors_dtype_of(enum dtype dtype) {
    static const enum safetensors_dtype map[DTYPE_COUNT] = {
        [DTYPE_F32] = SAFETENSORS_F32,
        [DTYPE_BF16] = SAFETENSORS_BF16,
        [DTYPE_F64] = SAFETENSORS_F64,
        [DTYPE_I32] = SAFETENSORS_I32,
    };
    return map[dtype];
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
    uint64_t bits = (uint64_t)dtypes[entry->dtype].bits;
    for (int i = 0; i < entry->dim_count; i++) {
        const json_t *dim = json_array_get(shape, (size_t)i);
        if (!json_is_integer(dim) || json_integer_value(dim) < 0)
            return fail(path, entry->name, "a size in \"shape\" is not a whole number of at least 0");
        entry->shape[i] = json_integer_value(dim);
        if (__builtin_mul_overflow(bits, (uint64_t)entry->shape[i], &bits) || bits > INT64_MAX)
            return fail(path, entry->name, "\"shape\" is too large");
    }
    if (bits % 8 != 0)
        return fail(path, entry->name, "\"shape\" and \"dtype\" do not fill whole bytes");
    *bytes = bits / 8;
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

/* A name ends up in messages and logs: nothing in it may move the cursor of a terminal or begin a line. */
static enum status check_name(const char *path, const char *name) {
    for (const char *c = name; *c; c++)
        if ((unsigned char)*c < 0x20 || *c == 0x7F)
            return status_fail(STATUS_FORMAT, "%s: the name of a tensor holds the control character 0x%02x", path,
                               (unsigned char)*c);
    return STATUS_OK;
}

static enum status read_metadata(struct safetensors *file, json_t *metadata) {
    const char *key;
    json_t *value;
    if (!json_is_object(metadata))
        return status_fail(STATUS_FORMAT, "%s: \"__metadata__\" is not an object", file->path);
    TRY(memory_alloc(&file->metadata, json_object_size(metadata), sizeof *file->metadata));
    json_object_foreach(metadata, key, value) {
        if (!json_is_string(value))
            return status_fail(STATUS_FORMAT, "%s: a member of \"__metadata__\" is not a string", file->path);
        file->metadata[file->metadata_count++] =
            (struct safetensors_metadata){memory_copy_string(key), memory_copy_string(json_string_value(value))};
    }
    return STATUS_OK;
}

static enum status read_entry(struct safetensors *file, const char *name, const json_t *value) {
    struct safetensors_entry *entry = &file->entries[file->entry_count++];
    entry->name = memory_copy_string(name);
    uint64_t bytes = 0;
    TRY(check_name(file->path, name));
    if (!json_is_object(value))
        return fail(file->path, name, "is not an object");
    if (json_object_size(value) > 3)
        return fail(file->path, name, "has more than \"dtype\", \"shape\" and \"data_offsets\"");
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
    TRY(memory_alloc(&file->entries, json_object_size(header), sizeof *file->entries));
    json_object_foreach(header, name, value) {
        TRY(strcmp(name, METADATA) == 0 ? read_metadata(file, value) : read_entry(file, name, value));
    }
    return STATUS_OK;
}

/* Read, not looked at in the map: what a disk cannot read is an error there, and a signal here. */
static enum status parse_header(const struct safetensors *file, const struct file_reader *reader, uint64_t *bytes,
                                json_t **header) {
    uint64_t size = file->map.size;
    unsigned char length[LENGTH_BYTES];
    char *text;
    *bytes = 0;
    if (size < LENGTH_BYTES)
        return status_fail(STATUS_FORMAT, "%s: too short for a safetensors file (%llu bytes)", file->path,
                           (unsigned long long)size);
    TRY(file_reader_at(reader, 0, length, sizeof length));
    for (int i = 0; i < LENGTH_BYTES; i++)
        *bytes |= (uint64_t)length[i] << 8 * i;
    if (*bytes > HEADER_BYTES_MAX || *bytes > size - LENGTH_BYTES)
        return status_fail(STATUS_FORMAT, "%s: not a safetensors file, or cut short: its header would have %llu bytes",
                           file->path, (unsigned long long)*bytes);
    TRY(memory_alloc(&text, *bytes + 1, 1));
    enum status status = file_reader_at(reader, LENGTH_BYTES, text, *bytes);
    if (status == STATUS_OK && *text != '{')
        status = status_fail(STATUS_FORMAT, "%s: not a safetensors file: its header does not begin with {", file->path);
    if (status == STATUS_OK)
        status = json_parse(file->path, text, *bytes, header);
    free(text);
    return status;
}

static enum status read_header(struct safetensors *file) {
    uint64_t size = file->map.size, header_bytes;
    struct file_reader reader;
    json_t *header;
    TRY(file_reader_open(&reader, file->path));
    enum status status = parse_header(file, &reader, &header_bytes, &header);
    file_reader_close(&reader);
    TRY(status);
    status = read_entries(file, header);
    json_decref(header);
    TRY(status);
    file->data = file->map.data + LENGTH_BYTES + header_bytes;
    return check_cover(file, size - LENGTH_BYTES - header_bytes);
}

enum status safetensors_open(struct safetensors *file, const char *path) {
    *file = (struct safetensors){.path = memory_copy_string(path)};
    enum status status = file_map_open(&file->map, path);
    if (status == STATUS_OK) {
        file_map_expect(&file->map, true);
        status = read_header(file);
        file_map_expect(&file->map, false);
    }
    if (status != STATUS_OK)
        safetensors_close(file);
    return status;
}

void safetensors_close(struct safetensors *file) {
    for (int i = 0; i < file->entry_count; i++)
        free(file->entries[i].name);
    for (int i = 0; i < file->metadata_count; i++) {
        free(file->metadata[i].key);
        free(file->metadata[i].value);
    }
    free(file->entries);
    free(file->metadata);
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

const char *safetensors_metadata_find(const struct safetensors *file, const char *key) {
    for (int i = 0; i < file->metadata_count; i++)
        if (strcmp(file->metadata[i].key, key) == 0)
            return file->metadata[i].value;
    return NULL;
}

/* ---- reading data ------------------------------------------------------------------------------------------------ */

static float half_to_float(uint16_t bits) {
    uint32_t exponent = bits >> 10 & 31, fraction = bits & 1023;
    union {
        uint32_t u;
        float f;
    } v;
    if (exponent == 0)
        v.f = (float)fraction * 0x1p-24f;
    else
        v.u = (exponent == 31 ? 255 : exponent + 112) << 23 | fraction << 13;
    v.u |= (uint32_t)(bits & 0x8000) << 16;
    return v.f;
}

/* Tensors in a file need not be aligned, so values are copied out. */
static double load_value(enum safetensors_dtype dtype, const unsigned char *at) {
    double wide;
    float single;
    uint16_t half;
    int64_t whole;
    switch (dtype) {
    case SAFETENSORS_F64:
        memcpy(&wide, at, sizeof wide);
        return wide;
    case SAFETENSORS_F32:
        memcpy(&single, at, sizeof single);
        return single;
    case SAFETENSORS_I64:
        memcpy(&whole, at, sizeof whole);
        return (double)whole;
    case SAFETENSORS_F16:
        memcpy(&half, at, sizeof half);
        return half_to_float(half);
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

/* The pair that most published models need: worth a loop without questions inside. */
static void widen_bf16(const unsigned char *from, int64_t count, float *host) {
    for (int64_t i = 0; i < count; i++) {
        uint16_t bits;
        memcpy(&bits, from + 2 * i, sizeof bits);
        host[i] = bf16_to_float(bits);
    }
}

static bool is_number(enum safetensors_dtype dtype) {
    return dtype == SAFETENSORS_F64 || dtype == SAFETENSORS_F32 || dtype == SAFETENSORS_F16 ||
           dtype == SAFETENSORS_BF16 || dtype == SAFETENSORS_I64;
}

enum status safetensors_read(const struct safetensors *file, const struct safetensors_entry *entry, int64_t first,
                             int64_t count, enum dtype to, void *host) {
    CHECK(first >= 0 && count >= 0 && first <= safetensors_elements(entry) - count);
    bool same = entry->dtype == safetensors_dtype_of(to);
    if (!same && (!is_number(entry->dtype) || to == DTYPE_I32))
        return status_fail(STATUS_FORMAT, "%s: tensor \"%s\" is %s and cannot be read as %s", file->path, entry->name,
                           dtypes[entry->dtype].name, dtype_name(to));
    int bytes = dtypes[entry->dtype].bits / 8; /* whole ones, for all that get here */
    const unsigned char *from = file->data + entry->begin + (uint64_t)first * (uint64_t)bytes;
    if (same && count > 0)
        memcpy(host, from, (size_t)count * (size_t)bytes);
    else if (entry->dtype == SAFETENSORS_BF16 && to == DTYPE_F32)
        widen_bf16(from, count, host);
    else
        for (int64_t i = 0; i < count; i++)
            store_value(to, host, i, load_value(entry->dtype, from + i * bytes));
    return STATUS_OK;
}

/* ---- writing ----------------------------------------------------------------------------------------------------- */

/* What is whole blocks of a disk, and so begins and ends at one. */
static bool is_blocks(const struct named_tensor *item) {
    size_t bytes = tensor_bytes(item->tensor);
    return bytes > 0 && bytes % FILE_BLOCK_BYTES == 0;
}

/* Whole blocks first; else widest dtype first, then by name: the order of the reference writer, which keeps every tensor
 * aligned. */
static int compare_items(const void *a, const void *b) {
    const struct named_tensor *x = *(const struct named_tensor *const *)a, *y = *(const struct named_tensor *const *)b;
    if (is_blocks(x) != is_blocks(y))
        return is_blocks(x) ? -1 : 1;
    size_t x_size = dtype_size(x->tensor.dtype), y_size = dtype_size(y->tensor.dtype);
    if (x_size != y_size)
        return x_size > y_size ? -1 : 1;
    return strcmp(x->name, y->name);
}

/* transformers asks for the format. */
static json_t *make_metadata(const struct safetensors_metadata *metadata, int count) {
    json_t *object = json_pack("{s:s}", "format", "pt");
    for (int i = 0; i < count; i++) {
        CHECK(json_object_get(object, metadata[i].key) == NULL);
        json_object_set_new(object, metadata[i].key, json_string(metadata[i].value));
    }
    return object;
}

static json_t *describe_tensor(const struct tensor *t, uint64_t begin) {
    json_t *shape = json_array();
    for (int d = 0; d < t->dim_count; d++)
        json_array_append_new(shape, json_integer(t->shape[d]));
    return json_pack("{s:s,s:o,s:[I,I]}", "dtype", dtypes[safetensors_dtype_of(t->dtype)].name, "shape", shape,
                     "data_offsets", (json_int_t)begin, (json_int_t)(begin + tensor_bytes(*t)));
}

/* Takes `metadata`; fills plan->begins with places within the data. */
static char *make_json(struct safetensors_plan *plan, json_t *metadata) {
    json_t *header = json_object();
    json_object_set_new(header, METADATA, metadata);
    uint64_t position = 0;
    for (int i = 0; i < plan->count; i++) {
        const struct named_tensor *item = plan->order[i];
        CHECK(json_object_get(header, item->name) == NULL);
        json_object_set_new(header, item->name, describe_tensor(&item->tensor, position));
        plan->begins[i] = position;
        position += tensor_bytes(item->tensor);
    }
    plan->file_bytes = position;
    char *text = json_dumps(header, JSON_COMPACT | JSON_PRESERVE_ORDER);
    json_decref(header);
    CHECK(text != NULL);
    return text;
}

/* Spaces at its end are allowed: they bring the data to a block where a tensor is whole blocks. */
static void make_header(struct safetensors_plan *plan, const char *json) {
    struct text header = {0};
    size_t unit = plan->count > 0 && is_blocks(plan->order[0]) ? FILE_BLOCK_BYTES : LENGTH_BYTES;
    size_t size = strlen(json), padded = (LENGTH_BYTES + size + unit - 1) / unit * unit - LENGTH_BYTES;
    for (int i = 0; i < LENGTH_BYTES; i++) {
        char byte = (char)(padded >> 8 * i & 0xFF);
        text_add(&header, &byte, 1);
    }
    text_printf(&header, "%s%*s", json, (int)(padded - size), "");
    plan->header = header.data;
    plan->header_bytes = header.size;
    for (int i = 0; i < plan->count; i++)
        plan->begins[i] += header.size;
    plan->file_bytes += header.size;
}

enum status safetensors_plan_init(struct safetensors_plan *plan, const struct named_tensor *items, int count,
                                  const struct safetensors_metadata *metadata, int metadata_count) {
    *plan = (struct safetensors_plan){.count = count};
    TRY(memory_alloc(&plan->order, (size_t)count, sizeof *plan->order));
    TRY(memory_alloc(&plan->begins, (size_t)count, sizeof *plan->begins));
    for (int i = 0; i < count; i++)
        plan->order[i] = &items[i];
    if (count)
        qsort(plan->order, (size_t)count, sizeof *plan->order, compare_items);
    char *json = make_json(plan, make_metadata(metadata, metadata_count));
    make_header(plan, json);
    free(json);
    return STATUS_OK;
}

void safetensors_plan_release(struct safetensors_plan *plan) {
    free(plan->order);
    free(plan->begins);
    free(plan->header);
    *plan = (struct safetensors_plan){0};
}

static enum status write_tensor(struct file_writer *file, const struct tensor *tensor, const struct device *device,
                                char *buffer) {
    size_t bytes = tensor_bytes(*tensor);
    for (size_t done = 0; done < bytes;) {
        size_t part = bytes - done < WRITE_CHUNK_BYTES ? bytes - done : WRITE_CHUNK_BYTES;
        device->copy_to_host(buffer, (const char *)tensor->data + done, part);
        TRY(file_writer_add(file, buffer, part));
        done += part;
    }
    return STATUS_OK;
}

static enum status write_planned(const char *path, const struct safetensors_plan *plan, const struct device *device,
                                 char *buffer) {
    struct file_writer file;
    TRY(file_writer_open(&file, path, false));
    enum status status = file_writer_add(&file, plan->header, plan->header_bytes);
    for (int i = 0; i < plan->count && status == STATUS_OK; i++)
        status = write_tensor(&file, &plan->order[i]->tensor, device, buffer);
    if (status == STATUS_OK)
        status = file_writer_flush(&file);
    enum status closed = file_writer_close(&file);
    return status == STATUS_OK ? closed : status;
}

enum status safetensors_write(const char *path, const struct named_tensor *items, int count,
                              const struct device *device) {
    struct safetensors_plan plan;
    char *buffer = NULL;
    enum status status = safetensors_plan_init(&plan, items, count, NULL, 0);
    if (status == STATUS_OK)
        status = memory_alloc(&buffer, WRITE_CHUNK_BYTES, 1);
    if (status == STATUS_OK)
        status = write_planned(path, &plan, device, buffer);
    free(buffer);
    safetensors_plan_release(&plan);
    return status;
}
