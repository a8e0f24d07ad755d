// rms_norm and its gradients on CUDA: float32 inside, 16 bytes per load, sums in a fixed order.
#include "ops/alignment.h"
#include "ops/cuda_stream.h"
#include "ops/partial_sums.cuh"
#include "ops/vector.cuh"

namespace megabagel {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kTileRows = 16;  // rows whose sums a block knows before its threads walk down the columns

// Calls f(k, column) for the vectors that this lane holds of a row of `width` values. K > 0: at most K of them, in an
// unrolled loop, so that what f keeps in an array of K stays in registers; K = 0: any number, k is 0.
template <int N, int K, typename F>
__device__ __forceinline__ void for_each_vector(int64_t width, int lane, F&& f) {
  if constexpr (K > 0) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const int64_t column = (lane + 32 * k) * N;
      if (column < width) f(k, column);
    }
  } else {
    for (int64_t column = lane * N; column < width; column += 32 * N) f(0, column);
  }
}

// A warp per row. With K > 0 the row is read once.
template <typename T, int N, int K>
__global__ void forward_kernel(const T* x, const T* weight, T* out, float* rstd, int64_t rows, int64_t width,
                               float eps) {
  const int lane = threadIdx.x % 32;
  for (int64_t row = blockIdx.x * int64_t(kWarps) + threadIdx.x / 32; row < rows; row += int64_t(gridDim.x) * kWarps) {
    const T* from = x + row * width;
    Vector<T, N> kept[K > 0 ? K : 1];
    float squares = 0.f;
    for_each_vector<N, K>(width, lane, [&](int k, int64_t column) {
      kept[k] = load<T, N>(from + column);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const float v = to_float(kept[k].values[j]);
        squares += v * v;
      }
    });
    const float r = rsqrtf(sum_over_warp(squares) / width + eps);
    if (lane == 0) rstd[row] = r;
    for_each_vector<N, K>(width, lane, [&](int k, int64_t column) {
      if constexpr (K == 0) kept[k] = load<T, N>(from + column);
      const Vector<T, N> w = load<T, N>(weight + column);
      Vector<T, N> result;
#pragma unroll
      for (int j = 0; j < N; ++j) {
        result.values[j] = from_float<T>(to_float(kept[k].values[j]) * r * to_float(w.values[j]));
      }
      store(out + row * width + column, result);
    });
  }
}

// sum(w dy x) of one row, known to the whole warp.
template <typename T, int N>
__device__ __forceinline__ float weighted_dot(const T* grad, const T* x, const T* weight, int64_t width, int lane) {
  float dot = 0.f;
  for_each_vector<N, 0>(width, lane, [&](int, int64_t column) {
    const Vector<T, N> dy = load<T, N>(grad + column), v = load<T, N>(x + column), w = load<T, N>(weight + column);
#pragma unroll
    for (int j = 0; j < N; ++j) dot += to_float(dy.values[j]) * to_float(w.values[j]) * to_float(v.values[j]);
  });
  return sum_over_warp(dot);
}

// A block takes tiles of rows in turn: first a warp per row for what needs the whole row, then a thread per column
// vector, which reads the tile again (from cache), writes dx and adds to this block's sums for the weight.
template <typename T, int N>
__global__ void backward_kernel(const T* grad, const T* x, const T* weight, const float* rstd, T* dx, float* partials,
                                int64_t rows, int64_t width) {
  __shared__ float r[kTileRows], scale[kTileRows];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  bool first = true;
  for (int64_t tile = blockIdx.x * int64_t(kTileRows); tile < rows; tile += int64_t(gridDim.x) * kTileRows) {
    const int count = static_cast<int>(min(int64_t(kTileRows), rows - tile));
    for (int i = warp; i < count; i += kWarps) {
      const int64_t at = (tile + i) * width;
      const float dot = weighted_dot<T, N>(grad + at, x + at, weight, width, lane);
      if (lane == 0) {
        r[i] = rstd[tile + i];
        scale[i] = dot * r[i] * r[i] * r[i] / width;
      }
    }
    __syncthreads();
    for (int64_t column = threadIdx.x * N; column < width; column += kThreads * N) {
      const Vector<T, N> w = load<T, N>(weight + column);
      float sums[N] = {};
#pragma unroll 4
      for (int i = 0; i < count; ++i) {
        const int64_t at = (tile + i) * width + column;
        const Vector<T, N> dy = load<T, N>(grad + at), v = load<T, N>(x + at);
        Vector<T, N> result;
#pragma unroll
        for (int j = 0; j < N; ++j) {
          const float g = to_float(dy.values[j]), value = to_float(v.values[j]);
          result.values[j] = from_float<T>(g * to_float(w.values[j]) * r[i] - value * scale[i]);
          sums[j] += g * value * r[i];
        }
        store(dx + at, result);
      }
      float* to = partials + blockIdx.x * width + column;
#pragma unroll
      for (int j = 0; j < N; ++j) to[j] = first ? sums[j] : to[j] + sums[j];
    }
    first = false;
    __syncthreads();
  }
}

void check(const char* op, const Tensor& x, const Tensor& weight) {
  STD_TORCH_CHECK(x.dim() == 2 && x.is_contiguous(), op, ": x must be contiguous with two dimensions.");
  STD_TORCH_CHECK(weight.dim() == 1 && weight.size(0) == x.size(1) && weight.is_contiguous() &&
                      weight.scalar_type() == x.scalar_type() && weight.get_device() == x.get_device(),
                  op, ": the weight must be contiguous [", x.size(1), "] of the type and on the device of x.");
}

std::tuple<Tensor, Tensor> rms_norm_cuda(const Tensor& x, const Tensor& weight, double eps) {
  check("rms_norm", x, weight);
  const int64_t rows = x.size(0), width = x.size(1);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device());
  Tensor out = torch::stable::empty_like(x);
  Tensor rstd = torch::stable::new_empty(x, {rows}, ScalarType::Float);
  const auto run = [&](auto zero, auto size, auto kept) {
    using T = decltype(zero);
    forward_kernel<T, decltype(size)::value, decltype(kept)::value>
        <<<grid(rows, kWarps), kThreads, 0, current_stream(x.get_device())>>>(
            static_cast<const T*>(x.const_data_ptr()), static_cast<const T*>(weight.const_data_ptr()),
            static_cast<T*>(out.mutable_data_ptr()), static_cast<float*>(rstd.mutable_data_ptr()), rows, width,
            static_cast<float>(eps));
  };
  dispatch_vector("rms_norm", x, aligned_width(weight, width), [&](auto zero, auto size) {
    const int64_t vectors = (width + 32 * size() - 1) / (32 * size());
    if (out.numel() == 0) return;
    if (vectors <= 4) {
      run(zero, size, std::integral_constant<int, 4>{});
    } else if (vectors <= 16) {
      run(zero, size, std::integral_constant<int, 16>{});
    } else {
      run(zero, size, std::integral_constant<int, 0>{});
    }
  });
  check_launch("rms_norm");
  return {out, rstd};
}

std::tuple<Tensor, Tensor> rms_norm_backward_cuda(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                                  const Tensor& rstd) {
  check("rms_norm_backward", x, weight);
  const int64_t rows = x.size(0), width = x.size(1);
  STD_TORCH_CHECK(grad.dim() == 2 && grad.size(0) == rows && grad.size(1) == width && grad.is_contiguous() &&
                      grad.scalar_type() == x.scalar_type() && grad.get_device() == x.get_device(),
                  "rms_norm_backward: the gradient must be contiguous [", rows, ", ", width, "] of the type of x.");
  STD_TORCH_CHECK(rstd.dim() == 1 && rstd.size(0) == rows && rstd.is_contiguous() &&
                      rstd.scalar_type() == ScalarType::Float && rstd.get_device() == x.get_device(),
                  "rms_norm_backward: rstd must be what the forward pass gave, [", rows, "].");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device());
  const int64_t blocks = std::min<int64_t>((rows + kTileRows - 1) / kTileRows, kPartialSums);
  Tensor dx = torch::stable::empty_like(x), d_weight = torch::stable::empty_like(weight);
  Tensor partials = torch::stable::new_empty(x, {blocks, width}, ScalarType::Float);
  const int64_t width_with_weight = aligned_width(weight, aligned_width(grad, width));
  dispatch_vector("rms_norm_backward", x, width_with_weight, [&](auto zero, auto size) {
    using T = decltype(zero);
    constexpr int N = decltype(size)::value;
    float* sums = static_cast<float*>(partials.mutable_data_ptr());
    if (dx.numel() > 0) {
      backward_kernel<T, N><<<static_cast<unsigned>(blocks), kThreads, 0, current_stream(x.get_device())>>>(
          static_cast<const T*>(grad.const_data_ptr()), static_cast<const T*>(x.const_data_ptr()),
          static_cast<const T*>(weight.const_data_ptr()), static_cast<const float*>(rstd.const_data_ptr()),
          static_cast<T*>(dx.mutable_data_ptr()), sums, rows, width);
    }
    add_partials(sums, blocks, width, static_cast<T*>(d_weight.mutable_data_ptr()), current_stream(x.get_device()));
  });
  check_launch("rms_norm_backward");
  return {dx, d_weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(megabagel, CUDA, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm_cuda));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward_cuda));
}

}  // namespace megabagel
