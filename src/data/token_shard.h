/* The file format of token shards. Private to data/.
 *
 * 64 bytes of header, little-endian: "CADRETOK", u32 version 1, u32 bytes per token, u64 token count, u64 XXH3-64 of the
 * tokens, u32 vocabulary size, zeros; then the tokens, u16 or u32.
 */
#pragma once

#include "data/corpus.h"

enum status token_shard_write(const char *path, const int32_t *tokens, int64_t count, int vocab_size) MUST_USE;
enum status token_shard_open(struct token_shard *shard, const char *path, int vocab_size) MUST_USE;
void token_shard_close(struct token_shard *shard);
