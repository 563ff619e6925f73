/* What reading or writing text takes at least, to hold its time against what the machine can do at best. */
#pragma once

#include "model/model.h"

/* Operations (a multiply-add is two) of a prompt of so many tokens, read from the start of a sequence: those of its blocks, and
 * of the head for the last token alone. */
double prompt_operations(const struct model_config *config, int64_t token_count);

/* Bytes that one token after `context` others must read, as if no cache held any of them: the packed weights of attention, of
 * the head and of K experts of each block, or of the dense layer; router and norms in full precision; a row of the embedding;
 * keys and values of the context. Not what it writes, nor its own activations, which are a few rows. The model must be whole on
 * this rank; it may be shapes alone. */
double token_bytes(const struct model *model, int64_t context);
