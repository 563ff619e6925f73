/* The CUDA device of this process, for device/, for transports, and for tests of kernels. */
#pragma once

#include "device/device.h"

enum status device_cuda(const struct device **out) MUST_USE;
void device_cuda_prefer(int number); /* before device_cuda: the device of this number, modulo how many there are */
const struct device *device_cuda_absent(void); /* where there is none: its name, and no function */
const char *device_cuda_describe(void); /* after device_cuda, as all below */
void device_cuda_identify(unsigned char id[DEVICE_ID_BYTES]);
int64_t device_cuda_memory_bytes(int local_size);

/* Memory that host and device both reach, at the same address; slow for the device, hence for tests only. Stays until the
 * program ends. NULL where there is none. */
void *device_cuda_host_memory(size_t bytes);

/* ---- for scratch memory of kernels ------------------------------------------------------------------------------------- */

/* Asked before scratch moves: recordings that use it are out of date from now on. False where this thread is recording: memory
 * stays as it is, and the recording is given up. */
bool device_cuda_may_move(void);

#ifdef CADRE_CUDA_MODEL
/* While this thread records: memory for one operation of the recording, not a number whenever that is repeated. Else NULL. */
void *device_cuda_recorded_scratch(size_t bytes);

/* For tests: whether a kernel has run in whose name, as it is written where it is launched, stands `word`. */
bool cuda_model_ran(const char *word);
#endif

/* ---- for transports: a queue of work beside the order of the device (a stream), and marks in either (events) ----------- */

void *device_cuda_queue_open(void);
void device_cuda_queue_finish(void *queue);
void device_cuda_queue_close(void *queue); /* what is in it is finished first */

void *device_cuda_mark_make(void);
void device_cuda_mark_free(void *mark);

/* What is asked of the queue from now on begins after all that was asked of the device so far. `mark` is moved. */
void device_cuda_queue_follow(void *queue, void *mark);
/* The mark stands behind all that was asked of the queue so far. */
void device_cuda_queue_mark(void *queue, void *mark);
/* What is asked of the device from now on begins after the mark. */
void device_cuda_follow(void *mark);
