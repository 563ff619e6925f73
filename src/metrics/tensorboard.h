/* TensorBoard event files: records framed by masked CRC-32C, each an Event protobuf, written by hand.
 * Source: tensorflow/core/lib/io/record_writer.h and core/util/event.proto. */
#pragma once

#include "base/file.h"

struct tensorboard {
    struct file_writer writer;
    bool open;
};

/* A new event file in `directory` (made if missing), named after the time and the host. */
enum status tensorboard_open(struct tensorboard *board, const char *directory, double wall_seconds) MUST_USE;
enum status tensorboard_add(struct tensorboard *board, const char *tag, double value, int64_t step,
                            double wall_seconds) MUST_USE;
void tensorboard_close(struct tensorboard *board);

/* CRC-32C (Castagnoli) of bytes. */
uint32_t crc32c(const void *data, size_t size);
