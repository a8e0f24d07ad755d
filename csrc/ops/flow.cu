// flow_mix on CUDA: a row of threads makes a token, 16 bytes per access wherever memory is contiguous.
#include "ops/flow.h"

#include <tuple>

#include "ops/cuda_stream.h"
#include "ops/vector.cuh"

namespace megabagel {
namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;

// Tokens of a grid; more than there are where it makes no sense, so that it is nobody's picture.
__device__ __forceinline__ int64_t area(const int64_t* grid, int64_t tokens) {
  const int64_t rows = grid[0], columns = grid[1];
  return rows < 0 || columns < 0 || (columns > 0 && rows > tokens / columns) ? tokens + 1 : rows * columns;
}

// starts[i]: first token of picture i, starts[pictures]: behind the last one. One warp sums 32 grids at a time.
__global__ void starts_kernel(const int64_t* grids, int64_t pictures, int64_t tokens, int64_t* starts) {
  int64_t before = 0;
  for (int64_t base = 0; base < pictures; base += kWarp) {
    const int64_t i = base + threadIdx.x;
    int64_t sum = i < pictures ? area(grids + 2 * i, tokens) : 0;
    for (int step = 1; step < kWarp; step *= 2) {
      const int64_t other = __shfl_up_sync(0xffffffffu, sum, step);
      sum += threadIdx.x >= step ? other : 0;
    }
    if (i < pictures) {
      starts[i + 1] = before + sum;
    }
    before += __shfl_sync(0xffffffffu, sum, kWarp - 1);
  }
  if (threadIdx.x == 0) {
    starts[0] = 0;
  }
}

// Last picture that begins at or before the token and is not empty, or the number of pictures.
__device__ __forceinline__ int64_t picture_of(const int64_t* starts, int64_t pictures, int64_t token) {
  int64_t low = 0, high = pictures;  // the first i with starts[i + 1] > token
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (starts[middle + 1] > token) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

template <typename T, int N>
__global__ void kernel(const float* latents, const int64_t* grids, const int64_t* starts, const float* noise,
                       const float* times, FlowSizes sizes, T* noised, float* target) {
  const int64_t d = sizes.width, p = sizes.patch;
  const int64_t step = int64_t(gridDim.x) * blockDim.y;
  for (int64_t token = int64_t(blockIdx.x) * blockDim.y + threadIdx.y; token < sizes.tokens; token += step) {
    const int64_t picture = picture_of(starts, sizes.pictures, token);
    const bool present = picture < sizes.pictures && starts[picture + 1] <= sizes.tokens;
    const int64_t start = present ? starts[picture] : 0;
    const unsigned columns = present ? grids[2 * picture + 1] : 1, local = token - start;
    const int64_t across = columns * p, plane = present ? (starts[picture + 1] - start) * p * p : 0;
    const float* corner = latents + start * d + local / columns * p * across + local % columns * p;
    const float t = times[token];
    for (unsigned k = threadIdx.x * N; k < d; k += blockDim.x * N) {
      const unsigned channels = sizes.channels, inside = k / channels, channel = k % channels;
      const float* from = corner + channel * plane + inside / unsigned(p) * across + inside % unsigned(p);
      const Vector<float, N> n = load<float, N>(noise + token * d + k);
      Vector<T, N> mixed;
      Vector<float, N> velocity;
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const float x = present ? from[j * plane] : 0.f;
        mixed.values[j] = from_float<T>(present ? (1.f - t) * x + t * n.values[j] : 0.f);
        velocity.values[j] = present ? n.values[j] - x : 0.f;
      }
      store(noised + token * d + k, mixed);
      store(target + token * d + k, velocity);
    }
  }
}

template <typename T, int N>
void launch(const Tensor& latents, const Tensor& grids, const Tensor& starts, const Tensor& noise, const Tensor& times,
            const FlowSizes& sizes, Tensor& noised, Tensor& target) {
  unsigned across = 1;
  while (across < sizes.width / N && across < kThreads) {
    across *= 2;
  }
  const dim3 block(across, kThreads / across);
  kernel<T, N><<<grid(sizes.tokens, block.y), block, 0, current_stream(noise.get_device())>>>(
      latents.const_data_ptr<float>(), grids.const_data_ptr<int64_t>(), starts.const_data_ptr<int64_t>(),
      noise.const_data_ptr<float>(), times.const_data_ptr<float>(), sizes, static_cast<T*>(noised.mutable_data_ptr()),
      target.mutable_data_ptr<float>());
}

std::tuple<Tensor, Tensor> flow_mix_cuda(const Tensor& latents, const Tensor& grids, const Tensor& noise,
                                         const Tensor& times, int64_t patch_size, ScalarType dtype) {
  const FlowSizes sizes = flow_sizes(latents, grids, noise, times, patch_size, dtype);
  STD_TORCH_CHECK(sizes.tokens < int64_t(1) << 31 && sizes.width < int64_t(1) << 31,
                  "flow_mix: tokens and their values must be fewer than 2^31.");
  const torch::stable::accelerator::DeviceGuard guard(noise.get_device());
  const Tensor clean = torch::stable::contiguous(latents), shapes = torch::stable::contiguous(grids),
               drawn = torch::stable::contiguous(noise), when = torch::stable::contiguous(times);
  Tensor noised = torch::stable::new_empty(noise, {sizes.tokens, sizes.width}, dtype);
  Tensor target = torch::stable::new_empty(noise, {sizes.tokens, sizes.width});
  Tensor starts = torch::stable::new_empty(grids, {sizes.pictures + 1});
  if (sizes.tokens > 0) {
    starts_kernel<<<1, kWarp, 0, current_stream(noise.get_device())>>>(
        shapes.const_data_ptr<int64_t>(), sizes.pictures, sizes.tokens, starts.mutable_data_ptr<int64_t>());
    const bool whole = sizes.channels % 4 == 0 && reinterpret_cast<uintptr_t>(drawn.const_data_ptr()) % 16 == 0;
    const auto start = [&](auto zero) {
      using T = decltype(zero);
      whole ? launch<T, 4>(clean, shapes, starts, drawn, when, sizes, noised, target)
            : launch<T, 1>(clean, shapes, starts, drawn, when, sizes, noised, target);
    };
    dtype == ScalarType::Float ? start(float{}) : start(__nv_bfloat16{});
  }
  check_launch("flow_mix");
  return {noised, target};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(megabagel, CUDA, m) { m.impl("flow_mix", TORCH_BOX(&flow_mix_cuda)); }

}  // namespace megabagel
