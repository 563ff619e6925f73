#include "metrics/tensorboard.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

uint32_t crc32c(const void *data, size_t size) {
    const unsigned char *bytes = data;
    uint32_t crc = 0xFFFFFFFFu;
    for (size_t i = 0; i < size; i++) {
        crc ^= bytes[i];
        for (int bit = 0; bit < 8; bit++)
            crc = crc >> 1 ^ (crc & 1 ? 0x82F63B78u : 0);
    }
    return ~crc;
}

static void add_little_endian(struct text *out, uint64_t value, int byte_count) {
    for (int i = 0; i < byte_count; i++) {
        char byte = (char)(value >> 8 * i & 0xFF);
        text_add(out, &byte, 1);
    }
}

static void add_varint(struct text *out, uint64_t value) {
    for (; value >= 0x80; value >>= 7)
        add_little_endian(out, (value & 0x7F) | 0x80, 1);
    add_little_endian(out, value, 1);
}

/* Protobuf: a field's key is its number and wire type (0 varint, 1 eight bytes, 2 counted bytes, 5 four bytes). */
static void add_key(struct text *out, int field, int wire) {
    add_varint(out, (uint64_t)(field << 3 | wire));
}

static void add_double(struct text *out, int field, double value) {
    uint64_t bits;
    memcpy(&bits, &value, sizeof bits);
    add_key(out, field, 1);
    add_little_endian(out, bits, 8);
}

static void add_bytes(struct text *out, int field, const char *data, size_t size) {
    add_key(out, field, 2);
    add_varint(out, size);
    text_add(out, data, size);
}

/* The mask keeps a checksum stored inside checksummed data from cancelling out. */
static uint32_t masked_crc(const void *data, size_t size) {
    uint32_t crc = crc32c(data, size);
    return (crc >> 15 | crc << 17) + 0xA282EAD8u;
}

static enum status add_record(struct tensorboard *board, const struct text *event) {
    struct text record = {0};
    add_little_endian(&record, event->size, 8);
    add_little_endian(&record, masked_crc(record.data, 8), 4);
    text_add(&record, event->data, event->size);
    add_little_endian(&record, masked_crc(event->data, event->size), 4);
    enum status status = file_writer_add(&board->writer, record.data, record.size);
    text_release(&record);
    return status;
}

enum status tensorboard_open(struct tensorboard *board, const char *directory, double wall_seconds) {
    *board = (struct tensorboard){0};
    TRY(directory_make(directory));
    char host[256] = "localhost";
    gethostname(host, sizeof host - 1);
    char *path = text_format("%s/events.out.tfevents.%010lld.%s.%d", directory, (long long)wall_seconds, host,
                             (int)getpid());
    enum status status = file_writer_open(&board->writer, path, false);
    free(path);
    TRY(status);
    board->open = true;
    struct text event = {0};
    add_double(&event, 1, wall_seconds);
    add_bytes(&event, 3, "brain.Event:2", strlen("brain.Event:2"));
    status = add_record(board, &event);
    text_release(&event);
    return status;
}

enum status tensorboard_add(struct tensorboard *board, const char *tag, double value, int64_t step,
                            double wall_seconds) {
    struct text scalar = {0}, summary = {0}, event = {0};
    float single = (float)value;
    uint32_t bits;
    memcpy(&bits, &single, sizeof bits);
    add_bytes(&scalar, 1, tag, strlen(tag));
    add_key(&scalar, 2, 5);
    add_little_endian(&scalar, bits, 4);
    add_bytes(&summary, 1, scalar.data, scalar.size);
    add_double(&event, 1, wall_seconds);
    add_key(&event, 2, 0);
    add_varint(&event, (uint64_t)step);
    add_bytes(&event, 5, summary.data, summary.size);
    enum status status = add_record(board, &event);
    text_release(&scalar);
    text_release(&summary);
    text_release(&event);
    return status;
}

void tensorboard_close(struct tensorboard *board) {
    if (board->open) {
        enum status ignored = file_writer_close(&board->writer);
        (void)ignored;
    }
    board->open = false;
}
