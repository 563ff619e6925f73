#include "data/token_shard.h"

#include "base/hash.h"
#include "base/memory.h"
#include <stdlib.h>
#include <string.h>

enum { HEADER_BYTES = 64, SHORT_VOCAB_MAX = 65536 };

struct shard_header {
    char magic[8];
    uint32_t version, bytes_per_token;
    uint64_t token_count, hash;
    uint32_t vocab_size;
    char zeros[HEADER_BYTES - 36];
};

static const char MAGIC[8] = {'C', 'A', 'D', 'R', 'E', 'T', 'O', 'K'};

enum status token_shard_write(const char *path, const int32_t *tokens, int64_t count, int vocab_size) {
    _Static_assert(sizeof(struct shard_header) >= HEADER_BYTES, "header");
    int width = vocab_size <= SHORT_VOCAB_MAX ? 2 : 4;
    size_t bytes = (size_t)count * (size_t)width;
    char *file;
    TRY(memory_alloc(&file, HEADER_BYTES + bytes, 1));
    for (int64_t i = 0; i < count; i++) {
        uint32_t token = (uint32_t)tokens[i];
        memcpy(file + HEADER_BYTES + i * width, &token, (size_t)width);
    }
    struct shard_header header = {.version = 1,
                                  .bytes_per_token = (uint32_t)width,
                                  .token_count = (uint64_t)count,
                                  .hash = hash_bytes(file + HEADER_BYTES, bytes, 0),
                                  .vocab_size = (uint32_t)vocab_size};
    memcpy(header.magic, MAGIC, sizeof MAGIC);
    memcpy(file, &header, HEADER_BYTES);
    enum status status = file_write(path, file, HEADER_BYTES + bytes);
    free(file);
    return status;
}

static uint32_t token_at(const struct token_shard *shard, int64_t index) {
    uint32_t token = 0;
    memcpy(&token, shard->map.data + HEADER_BYTES + index * shard->bytes_per_token, (size_t)shard->bytes_per_token);
    return token;
}

static enum status check(struct token_shard *shard, const char *path, int vocab_size) {
    struct shard_header header;
    if (shard->map.size < HEADER_BYTES)
        return status_fail(STATUS_FORMAT, "%s: too short for a token shard", path);
    memcpy(&header, shard->map.data, HEADER_BYTES);
    if (memcmp(header.magic, MAGIC, sizeof MAGIC) != 0 || header.version != 1 ||
        (header.bytes_per_token != 2 && header.bytes_per_token != 4))
        return status_fail(STATUS_FORMAT, "%s: is not a token shard of version 1", path);
    uint64_t bytes = shard->map.size - HEADER_BYTES;
    if (bytes % header.bytes_per_token != 0 || bytes / header.bytes_per_token != header.token_count)
        return status_fail(STATUS_FORMAT, "%s: is cut short: %llu tokens are missing or too many", path,
                           (unsigned long long)header.token_count);
    if (hash_bytes(shard->map.data + HEADER_BYTES, bytes, 0) != header.hash)
        return status_fail(STATUS_FORMAT, "%s: is damaged; remove its directory to prepare the data again", path);
    shard->bytes_per_token = (int)header.bytes_per_token;
    shard->token_count = (int64_t)header.token_count;
    for (int64_t i = 0; i < shard->token_count; i++)
        if (token_at(shard, i) >= (uint32_t)vocab_size)
            return status_fail(STATUS_FORMAT, "%s: token %lld is %u, the vocabulary has %d", path, (long long)i,
                               token_at(shard, i), vocab_size);
    return STATUS_OK;
}

enum status token_shard_open(struct token_shard *shard, const char *path, int vocab_size) {
    *shard = (struct token_shard){0};
    TRY(file_map_open(&shard->map, path));
    enum status status = check(shard, path, vocab_size);
    if (status != STATUS_OK)
        token_shard_close(shard);
    return status;
}

void token_shard_close(struct token_shard *shard) {
    file_map_close(&shard->map);
    *shard = (struct token_shard){0};
}

void token_shard_copy(const struct token_shard *shard, int64_t first, int64_t count, int32_t *out) {
    CHECK(first >= 0 && count >= 0 && first + count <= shard->token_count);
    for (int64_t i = 0; i < count; i++)
        out[i] = (int32_t)token_at(shard, first + i);
}
