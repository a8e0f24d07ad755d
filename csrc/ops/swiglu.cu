// swiglu and its gradient on CUDA: 16 bytes per load, float32 inside.
#include "ops/alignment.h"
#include "ops/cuda_stream.h"
#include "ops/vector.cuh"

namespace megabagel {
namespace {

constexpr int kThreads = 256;

template <typename T, int N>
__global__ void forward_kernel(const T* x, T* out, int64_t rows, int64_t width) {
  const int64_t per_row = width / N, total = rows * per_row;
  for (int64_t i = blockIdx.x * int64_t(kThreads) + threadIdx.x; i < total; i += int64_t(gridDim.x) * kThreads) {
    const int64_t row = i / per_row, column = i % per_row * N;
    const Vector<T, N> gate = load<T, N>(x + row * 2 * width + column);
    const Vector<T, N> up = load<T, N>(x + row * 2 * width + width + column);
    Vector<T, N> result;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float g = to_float(gate.values[j]);
      result.values[j] = from_float<T>(g / (1.f + __expf(-g)) * to_float(up.values[j]));
    }
    store(out + row * width + column, result);
  }
}

template <typename T, int N>
__global__ void backward_kernel(const T* grad, const T* x, T* out, int64_t rows, int64_t width) {
  const int64_t per_row = width / N, total = rows * per_row;
  for (int64_t i = blockIdx.x * int64_t(kThreads) + threadIdx.x; i < total; i += int64_t(gridDim.x) * kThreads) {
    const int64_t row = i / per_row, column = i % per_row * N, at = row * 2 * width + column;
    const Vector<T, N> dy = load<T, N>(grad + row * width + column);
    const Vector<T, N> gate = load<T, N>(x + at);
    const Vector<T, N> up = load<T, N>(x + at + width);
    Vector<T, N> d_gate, d_up;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float g = to_float(gate.values[j]), d = to_float(dy.values[j]), s = 1.f / (1.f + __expf(-g));
      d_gate.values[j] = from_float<T>(d * to_float(up.values[j]) * s * (1.f + g * (1.f - s)));
      d_up.values[j] = from_float<T>(d * g * s);
    }
    store(out + at, d_gate);
    store(out + at + width, d_up);
  }
}

Tensor swiglu_cuda(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 2 && x.size(1) % 2 == 0 && x.is_contiguous(),
                  "swiglu: x must be contiguous with two dimensions, the last one even.");
  const int64_t rows = x.size(0), width = x.size(1) / 2;
  Tensor out = torch::stable::new_empty(x, {rows, width});
  const torch::stable::accelerator::DeviceGuard guard(x.get_device());
  dispatch_vector("swiglu", x, width, [&](auto zero, auto size) {
    using T = decltype(zero);
    constexpr int N = decltype(size)::value;
    if (out.numel() > 0) {
      forward_kernel<T, N><<<grid(out.numel() / N, kThreads), kThreads, 0, current_stream(x.get_device())>>>(
          static_cast<const T*>(x.const_data_ptr()), static_cast<T*>(out.mutable_data_ptr()), rows, width);
    }
  });
  check_launch("swiglu");
  return out;
}

Tensor swiglu_backward_cuda(const Tensor& grad, const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 2 && x.size(1) % 2 == 0 && x.is_contiguous(),
                  "swiglu_backward: x must be contiguous with two dimensions, the last one even.");
  const int64_t rows = x.size(0), width = x.size(1) / 2;
  STD_TORCH_CHECK(grad.dim() == 2 && grad.size(0) == rows && grad.size(1) == width && grad.is_contiguous() &&
                      grad.scalar_type() == x.scalar_type() && grad.get_device() == x.get_device(),
                  "swiglu_backward: the gradient must be contiguous [", rows, ", ", width, "] of the type of x.");
  Tensor out = torch::stable::empty_like(x);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device());
  dispatch_vector("swiglu_backward", x, aligned_width(grad, width), [&](auto zero, auto size) {
    using T = decltype(zero);
    constexpr int N = decltype(size)::value;
    if (grad.numel() > 0) {
      backward_kernel<T, N><<<grid(grad.numel() / N, kThreads), kThreads, 0, current_stream(x.get_device())>>>(
          static_cast<const T*>(grad.const_data_ptr()), static_cast<const T*>(x.const_data_ptr()),
          static_cast<T*>(out.mutable_data_ptr()), rows, width);
    }
  });
  check_launch("swiglu_backward");
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(megabagel, CUDA, m) {
  m.impl("swiglu", TORCH_BOX(&swiglu_cuda));
  m.impl("swiglu_backward", TORCH_BOX(&swiglu_backward_cuda));
}

}  // namespace megabagel
