/* Growing strings, lists of strings, and the nearest known word to a mistyped one. */
#pragma once

#include "base/status.h"
#include <stddef.h>

/* A growing byte string, always followed by a zero byte. A zeroed struct is an empty one. */
struct text {
    char *data; /* NULL while nothing was added */
    size_t size;
    size_t capacity;
};

void text_add(struct text *text, const void *bytes, size_t size);
void text_add_string(struct text *text, const char *string);
void text_printf(struct text *text, const char *format, ...) PRINTF_LIKE(2, 3);
void text_clear(struct text *text); /* size 0, memory kept */
void text_release(struct text *text);
const char *text_string(const struct text *text); /* "" when empty; borrowed until the next change */

/* printf into fresh memory; the caller frees it. */
char *text_format(const char *format, ...) PRINTF_LIKE(1, 2);

/* An owned list of owned strings. A zeroed struct is an empty one. */
struct text_list {
    char **items;
    size_t count;
};

void text_list_add(struct text_list *list, const char *string);
void text_list_release(struct text_list *list);

/* Index of the candidate with the fewest edits from `word`; -1 where none is closer than half of its length. */
int text_nearest(const char *word, const char *const *candidates, int candidate_count);

/* "1,234,567" into buffer; returns buffer, which must hold 32 bytes. */
char *text_count(char *buffer, long long value);

/* "1.50 GiB" into buffer; returns buffer, which must hold 32 bytes. */
char *text_bytes(char *buffer, double bytes);
