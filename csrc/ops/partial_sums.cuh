// Sums in a fixed order on CUDA: over a warp, and of the partial sums that blocks leave behind for a weight's gradient.
#pragma once

#include "ops/vector.cuh"

namespace megabagel {

// Blocks with a sum of their own: enough to fill any GPU, and the same number on every GPU.
constexpr int64_t kPartialSums = 512;

// The sum over all 32 lanes, known to each.
__device__ __forceinline__ float sum_over_warp(float x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(~0u, x, distance);
  return x;
}

// A block of 32 columns x 32 threads, each of which adds every 32nd partial sum of its column.
template <typename T>
__global__ void add_partials_kernel(const float* partials, int64_t blocks, int64_t width, T* to) {
  __shared__ float sums[32][32];
  const int64_t column = blockIdx.x * int64_t(32) + threadIdx.x;
  float sum = 0.f;
  if (column < width) {
#pragma unroll 8
    for (int64_t b = threadIdx.y; b < blocks; b += 32) sum += partials[b * width + column];
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y == 0 && column < width) {
    for (int i = 1; i < 32; ++i) sum += sums[i][threadIdx.x];
    to[column] = from_float<T>(sum);
  }
}

// Column sums of partials [blocks, width] -> to [width]; zeros for no blocks.
template <typename T>
void add_partials(const float* partials, int64_t blocks, int64_t width, T* to, cudaStream_t stream) {
  if (width == 0) return;
  add_partials_kernel<<<static_cast<unsigned>((width + 31) / 32), dim3(32, 32), 0, stream>>>(partials, blocks, width, to);
}

}  // namespace megabagel
