/* Transfers between tensors in the own memory of devices, one or a share of one for each rank.
 *
 * What comm.h says holds in the order of the device: a transfer reads what was asked for before its start, and what is asked for
 * after its wait finds it done. There are two ways:
 *
 *   COMM_WAY_NCCL  from device to device, by NVIDIA's library, loaded when it is first needed. Neither start nor wait waits for the
 *                  device. It wants a device of its own for every rank.
 *   COMM_WAY_HOST  through the processor's memory, over the communicator of the same ranks: for every transport and any number of
 *                  ranks on a device. Start waits until the device has come to it, wait until all is there.
 */
#pragma once

#include "comm/comm.h"
#include "device/device.h"

enum comm_way { COMM_WAY_HOST, COMM_WAY_NCCL };

/* Where the buffers of a communicator are. Zeroed, or with the processor as the device: in the processor's memory. */
struct comm_memory {
    const struct device *device;
    enum comm_way way;
};

/* The communicator becomes one for that memory, and what it was its host, which goes with it; nothing where the memory is the
 * processor's. Not collective, nor are failures: only the first transfer finds the others. A part of it is for the same memory. */
enum status comm_on_device(struct comm *comm, struct comm_memory memory) MUST_USE;

enum comm_wish { COMM_WISH_AUTO, COMM_WISH_NCCL, COMM_WISH_HOST };
enum { COMM_MEMORY_LINE_BYTES = 256 };

/* Collective. How the ranks of `world`, each with its device, had best exchange tensors: the same way on each. `line` gets words
 * for a person. STATUS_USAGE where NCCL was wished for and cannot be, with the reason. */
enum status comm_memory_choose(struct comm *world, const struct device *device, enum comm_wish wish, struct comm_memory *out,
                               char line[COMM_MEMORY_LINE_BYTES]) MUST_USE;
