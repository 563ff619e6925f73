/* safetensors files: reading with every check before any use, and writing.
 *
 * Layout: u64 little-endian header size N; N bytes of JSON {name: {dtype, shape, data_offsets}}; the data, little-endian,
 * row-major, without holes. Source: github.com/huggingface/safetensors, safetensors/src/tensor.rs.
 */
#pragma once

#include "base/file.h"
#include "device/device.h"
#include "tensor/named.h"

enum { SAFETENSORS_DIMS_MAX = 8 };

enum safetensors_dtype {
    SAFETENSORS_F64, SAFETENSORS_F32, SAFETENSORS_F16, SAFETENSORS_BF16,
    SAFETENSORS_I64, SAFETENSORS_I32, SAFETENSORS_I16, SAFETENSORS_I8,
    SAFETENSORS_U64, SAFETENSORS_U32, SAFETENSORS_U16, SAFETENSORS_U8,
    SAFETENSORS_BOOL, SAFETENSORS_F8_E4M3, SAFETENSORS_F8_E5M2,
    SAFETENSORS_DTYPE_COUNT,
};

struct safetensors_entry {
    char *name;
    enum safetensors_dtype dtype;
    int dim_count;
    int64_t shape[SAFETENSORS_DIMS_MAX];
    uint64_t begin, end; /* bytes, from the start of the data */
    bool used;           /* a reader marks what it took; see weights.h */
};

/* An open file; entries sorted by name. */
struct safetensors {
    char *path;
    struct file_map map;
    const unsigned char *data; /* start of the data; inside the map */
    struct safetensors_entry *entries;
    int entry_count;
};

/* Map and check a file. STATUS_FORMAT with one line that says what is wrong where. Release with safetensors_close. */
enum status safetensors_open(struct safetensors *file, const char *path) MUST_USE;
void safetensors_close(struct safetensors *file);

/* NULL where no tensor has this name. */
struct safetensors_entry *safetensors_find(const struct safetensors *file, const char *name);

const char *safetensors_dtype_name(enum safetensors_dtype dtype);
int64_t safetensors_elements(const struct safetensors_entry *entry);

/* Elements first .. first+count-1 of an entry of F64, F32, F16 or BF16 as f32, bf16 or f64 into host memory; I32 as i32.
 * Other pairs: STATUS_FORMAT. */
enum status safetensors_read(const struct safetensors *file, const struct safetensors_entry *entry, int64_t first,
                             int64_t count, enum dtype to, void *host) MUST_USE;

/* Write tensors of a device (f32, bf16, f64, i32) into a new file and flush it to the disk. Names must differ. Copies
 * through a buffer of at most 4 MiB. Not atomic: write into a checkpoint draft. */
enum status safetensors_write(const char *path, const struct named_tensor *items, int count,
                              const struct device *device) MUST_USE;
