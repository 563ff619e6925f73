/* safetensors files: reading with every check before any use, and writing.
 *
 * Layout: u64 little-endian header size N; N bytes of JSON {name: {dtype, shape, data_offsets}}; the data,
 * little-endian, row-major, without holes. Source: github.com/huggingface/safetensors, safetensors/src/tensor.rs.
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
    SAFETENSORS_F8_E8M0, SAFETENSORS_F8_E4M3FNUZ, SAFETENSORS_F8_E5M2FNUZ,
    SAFETENSORS_C64, SAFETENSORS_F6_E2M3, SAFETENSORS_F6_E3M2, SAFETENSORS_F4,
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

/* One string of the header's "__metadata__". */
struct safetensors_metadata {
    char *key, *value;
};

/* An open file; entries sorted by name. */
struct safetensors {
    char *path;
    struct file_map map;
    const unsigned char *data; /* start of the data; inside the map */
    struct safetensors_entry *entries;
    int entry_count;
    struct safetensors_metadata *metadata; /* in the order of the file */
    int metadata_count;
};

/* Map and check a file. STATUS_FORMAT with one line that says what is wrong where; stricter than the reference reader:
 * duplicate names, unknown members and control characters in names are refused too. Release with safetensors_close. */
enum status safetensors_open(struct safetensors *file, const char *path) MUST_USE;
void safetensors_close(struct safetensors *file);

/* NULL where no tensor has this name. */
struct safetensors_entry *safetensors_find(const struct safetensors *file, const char *name);

/* A string of the metadata; NULL where there is none of this key. Borrowed until close. */
const char *safetensors_metadata_find(const struct safetensors *file, const char *key);

const char *safetensors_dtype_name(enum safetensors_dtype dtype);
int safetensors_dtype_bits(enum safetensors_dtype dtype);      /* of one element */
enum safetensors_dtype safetensors_dtype_of(enum dtype dtype); /* how a file names ours */
int64_t safetensors_elements(const struct safetensors_entry *entry);

/* Elements first .. first+count-1 of an entry of F64, F32, F16, BF16 or I64 as f32, bf16 or f64 into host memory,
 * rounded to nearest even (to bf16 by way of f32); I32 as i32. Other pairs: STATUS_FORMAT. Reads no other byte of the
 * file. */
enum status safetensors_read(const struct safetensors *file, const struct safetensors_entry *entry, int64_t first,
                             int64_t count, enum dtype to, void *host) MUST_USE;

/* What a file of some items looks like: how it begins, and where each of them stands. A function of their names, dtypes and
 * shapes alone. */
struct safetensors_plan {
    /* [count] owned; as they stand in the file: those that are whole blocks of FILE_BLOCK_BYTES, which begin at one; of these
     * and of the others widest dtype first, then by name, as the reference writer does. The items are the caller's. */
    const struct named_tensor **order;
    uint64_t *begins;                  /* [count] owned; byte of the file */
    int count;
    char *header; /* owned; the file's first header_bytes */
    size_t header_bytes;
    uint64_t file_bytes;
};

/* Data of the items is not looked at; names must differ. Metadata is {"format": "pt"} and the given pairs, with other keys.
 * Release with safetensors_plan_release, also after a failure. */
enum status safetensors_plan_init(struct safetensors_plan *plan, const struct named_tensor *items, int count,
                                  const struct safetensors_metadata *metadata, int metadata_count) MUST_USE;
void safetensors_plan_release(struct safetensors_plan *plan);

/* Write tensors of a device (f32, bf16, f64, i32) into a new file and flush it to the disk. Names must differ. Copies
 * through a buffer of at most 4 MiB. Not atomic: write into a checkpoint draft. Read back by safetensors_fill. */
enum status safetensors_write(const char *path, const struct named_tensor *items, int count,
                              const struct device *device) MUST_USE;
