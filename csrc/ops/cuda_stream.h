// The CUDA stream that torch runs on, for kernels that are launched outside torch's own headers.
#pragma once

#include <cuda_runtime.h>

#include "ops/common.h"

namespace megabagel {

// Stream of `device`. Looked up by name: torch's C++ wrapper for it is newer than the oldest torch we run on.
cudaStream_t current_stream(int32_t device);

// Raises a sentence when the kernel launched last could not start.
inline void check_launch(const char* op) {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, op, ": the CUDA kernel could not start: ", cudaGetErrorString(error), ".");
}

}  // namespace megabagel
