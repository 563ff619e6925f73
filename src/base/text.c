#include "base/text.h"

#include "base/memory.h"
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void text_reserve(struct text *text, size_t extra) {
    size_t needed = text->size + extra + 1;
    if (needed <= text->capacity)
        return;
    size_t capacity = text->capacity ? text->capacity : 64;
    while (capacity < needed)
        capacity *= 2;
    text->data = realloc(text->data, capacity);
    CHECK(text->data != NULL);
    text->capacity = capacity;
}

void text_add(struct text *text, const void *bytes, size_t size) {
    text_reserve(text, size);
    if (size)
        memcpy(text->data + text->size, bytes, size);
    text->size += size;
    text->data[text->size] = '\0';
}

void text_add_string(struct text *text, const char *string) {
    text_add(text, string, strlen(string));
}

static void text_vprintf(struct text *text, const char *format, va_list arguments) {
    va_list again;
    va_copy(again, arguments);
    int size = vsnprintf(NULL, 0, format, arguments);
    CHECK_OP(size, >=, 0);
    text_reserve(text, (size_t)size);
    vsnprintf(text->data + text->size, (size_t)size + 1, format, again);
    text->size += (size_t)size;
    va_end(again);
}

void text_printf(struct text *text, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    text_vprintf(text, format, arguments);
    va_end(arguments);
}

void text_clear(struct text *text) {
    text->size = 0;
    if (text->data)
        text->data[0] = '\0';
}

void text_release(struct text *text) {
    free(text->data);
    *text = (struct text){0};
}

const char *text_string(const struct text *text) {
    return text->data ? text->data : "";
}

char *text_format(const char *format, ...) {
    struct text text = {0};
    va_list arguments;
    va_start(arguments, format);
    text_vprintf(&text, format, arguments);
    va_end(arguments);
    return text.data;
}

void text_list_add(struct text_list *list, const char *string) {
    list->items = realloc(list->items, (list->count + 1) * sizeof *list->items);
    CHECK(list->items != NULL);
    list->items[list->count++] = memory_copy_string(string);
}

void text_list_release(struct text_list *list) {
    for (size_t i = 0; i < list->count; i++)
        free(list->items[i]);
    free(list->items);
    *list = (struct text_list){0};
}

/* Levenshtein distance with one row; words longer than the row count as far away. */
static int edit_distance(const char *a, const char *b) {
    enum { LONGEST = 127 };
    int row[LONGEST + 1];
    size_t a_size = strlen(a), b_size = strlen(b);
    if (a_size > LONGEST || b_size > LONGEST)
        return LONGEST;
    for (size_t j = 0; j <= b_size; j++)
        row[j] = (int)j;
    for (size_t i = 1; i <= a_size; i++) {
        int diagonal = row[0];
        row[0] = (int)i;
        for (size_t j = 1; j <= b_size; j++) {
            int best = diagonal + (a[i - 1] != b[j - 1]);
            diagonal = row[j];
            if (row[j] + 1 < best)
                best = row[j] + 1;
            if (row[j - 1] + 1 < best)
                best = row[j - 1] + 1;
            row[j] = best;
        }
    }
    return row[b_size];
}

int text_nearest(const char *word, const char *const *candidates, int candidate_count) {
    int nearest = -1, nearest_distance = (int)strlen(word) / 2 + 1;
    for (int i = 0; i < candidate_count; i++) {
        int distance = edit_distance(word, candidates[i]);
        if (distance < nearest_distance) {
            nearest = i;
            nearest_distance = distance;
        }
    }
    return nearest;
}

char *text_count(char *buffer, long long value) {
    char digits[32];
    int size = snprintf(digits, sizeof digits, "%lld", value < 0 ? -value : value);
    int out = 0;
    if (value < 0)
        buffer[out++] = '-';
    for (int i = 0; i < size; i++) {
        buffer[out++] = digits[i];
        if ((size - 1 - i) % 3 == 0 && i + 1 < size)
            buffer[out++] = ',';
    }
    buffer[out] = '\0';
    return buffer;
}

char *text_bytes(char *buffer, double bytes) {
    static const char *const units[] = {"B", "KiB", "MiB", "GiB", "TiB"};
    int unit = 0;
    while (bytes >= 1024 && unit < 4) {
        bytes /= 1024;
        unit++;
    }
    snprintf(buffer, 32, unit ? "%.2f %s" : "%.0f %s", bytes, units[unit]);
    return buffer;
}
