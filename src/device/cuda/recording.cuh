/* Whether this thread records what it asks of the CUDA device (device/device.h), for device_cuda.cu and the model of a device. */
#pragma once

#include "device/cuda/language.cuh"

#define _Noreturn [[noreturn]] /* of C, in the headers */
extern "C" {
#include "device/cuda/device_cuda.h"
}

bool recording_is_on(void);

/* What is recorded will be given up; false where nothing is. */
bool recording_spoil(void);

#ifndef CADRE_CUDA_MODEL
/* Where to this thread's work goes while it records, else NULL. */
cudaStream_t recording_stream(void);
#endif

extern const struct device_recorder cuda_recorder;
