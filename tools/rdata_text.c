/* Text out of an R lazy-load database (Rdata.rdb), without R.
 *
 *     rdata_text [--paragraphs] FILE.rdb
 *
 * Such a file is a row of records: u32 big-endian raw length, then one zlib stream that inflates to a serialised object.
 * Every record that is a character vector is printed, an element a line; others are passed over. With --paragraphs, lines
 * are trimmed, joined into paragraphs at empty lines, freed of underscores (italics), and each paragraph is followed by an
 * empty line. Source of the format: "R Internals", section 1.8, serialization formats, version 2 and 3, XDR.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <zlib.h>

enum { TYPE_STRING = 9, TYPE_CHARACTER_VECTOR = 16, RAW_BYTES_MAX = 256 << 20 };

struct reader {
    const unsigned char *data;
    size_t size, at;
    int failed;
};

static int fail(const char *what) {
    fprintf(stderr, "rdata_text: %s\n", what);
    return 1;
}

static int32_t read_int(struct reader *r) {
    if (r->failed || r->size - r->at < 4) {
        r->failed = 1;
        return 0;
    }
    const unsigned char *p = r->data + r->at;
    r->at += 4;
    return (int32_t)((uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8 | p[3]);
}

/* A counted run of bytes; NULL and size 0 where the record ends before it, or for R's missing value (-1). */
static const char *read_bytes(struct reader *r, int32_t size) {
    if (size < 0)
        return NULL;
    if (r->failed || r->size - r->at < (size_t)size) {
        r->failed = 1;
        return NULL;
    }
    const char *bytes = (const char *)r->data + r->at;
    r->at += (size_t)size;
    return bytes;
}

/* What is printed so far of a paragraph. */
struct printer {
    int paragraphs, open;
};

static void print_plain(const char *line, int32_t size) {
    fwrite(line, 1, (size_t)size, stdout);
    putchar('\n');
}

static void end_paragraph(struct printer *p) {
    if (p->open)
        fputs("\n\n", stdout);
    p->open = 0;
}

static void print_line(struct printer *p, const char *line, int32_t size) {
    if (!p->paragraphs) {
        print_plain(line, size);
        return;
    }
    while (size > 0 && strchr(" \t\r\n", line[size - 1]))
        size--;
    while (size > 0 && strchr(" \t\r\n", *line))
        line++, size--;
    if (size == 0) {
        end_paragraph(p);
        return;
    }
    if (p->open)
        putchar(' ');
    p->open = 1;
    for (int32_t i = 0; i < size; i++)
        if (line[i] != '_')
            putchar(line[i]);
}

/* An element may itself hold several lines. */
static void print_element(struct printer *p, const char *text, int32_t size) {
    const char *newline;
    while ((newline = memchr(text, '\n', (size_t)size))) {
        print_line(p, text, (int32_t)(newline - text));
        size -= (int32_t)(newline - text) + 1;
        text = newline + 1;
    }
    print_line(p, text, size);
}

static int print_record(const unsigned char *data, size_t size, int paragraphs) {
    struct reader r = {data, size, 0, 0};
    struct printer printer = {paragraphs, 0};
    const char *magic = read_bytes(&r, 2);
    if (!magic || memcmp(magic, "X\n", 2) != 0)
        return fail("a record is not in the XDR format");
    int32_t version = read_int(&r);
    read_int(&r); /* version of R that wrote it */
    read_int(&r); /* oldest that reads it */
    if (version == 3)
        read_bytes(&r, read_int(&r)); /* name of the encoding */
    int32_t flags = read_int(&r);
    if (r.failed || (flags & 0xFF) != TYPE_CHARACTER_VECTOR)
        return r.failed ? fail("a record is cut short") : 0;
    int32_t count = read_int(&r);
    for (int32_t i = 0; i < count && !r.failed; i++) {
        if ((read_int(&r) & 0xFF) != TYPE_STRING)
            return fail("an element of a character vector is no string");
        int32_t length = read_int(&r);
        const char *line = read_bytes(&r, length);
        print_element(&printer, line ? line : "", line ? length : 0);
    }
    end_paragraph(&printer);
    return r.failed ? fail("a record is cut short") : 0;
}

/* Inflate the record at *at and print it; moves *at behind it. */
static int next_record(const unsigned char *file, size_t size, size_t *at, int paragraphs) {
    struct reader r = {file, size, *at, 0};
    uint32_t raw_size = (uint32_t)read_int(&r);
    if (r.failed || raw_size > RAW_BYTES_MAX)
        return fail("the length of a record makes no sense");
    unsigned char *raw = malloc(raw_size ? raw_size : 1);
    z_stream stream = {0};
    if (!raw || inflateInit(&stream) != Z_OK) {
        free(raw);
        return fail("no memory");
    }
    stream.next_in = (unsigned char *)(uintptr_t)(file + r.at);
    stream.avail_in = (uInt)(size - r.at);
    stream.next_out = raw;
    stream.avail_out = raw_size;
    int ended = inflate(&stream, Z_FINISH) == Z_STREAM_END && stream.total_out == raw_size;
    *at = r.at + stream.total_in;
    inflateEnd(&stream);
    int result = ended ? print_record(raw, raw_size, paragraphs) : fail("a record cannot be decompressed");
    free(raw);
    return result;
}

int main(int argc, char **argv) {
    int paragraphs = argc == 3 && strcmp(argv[1], "--paragraphs") == 0;
    if (argc != 2 + paragraphs)
        return fail("usage: rdata_text [--paragraphs] FILE.rdb");
    FILE *stream = fopen(argv[1 + paragraphs], "rb");
    if (!stream)
        return fail("cannot open the file");
    unsigned char *file = NULL;
    size_t size = 0, got;
    do {
        file = realloc(file, size + (1 << 20));
        if (!file)
            return fail("no memory");
        got = fread(file + size, 1, 1 << 20, stream);
        size += got;
    } while (got > 0);
    fclose(stream);
    int result = 0;
    for (size_t at = 0; at < size && result == 0;)
        result = next_record(file, size, &at, paragraphs);
    free(file);
    return result || fflush(stdout) != 0;
}
