// Softmax cross-entropy over one shard of the classes, on CUDA: a block per row, 16 bytes per load, float32 inside. The
// order of every sum is fixed by the number of classes alone.
#include "ops/cross_entropy.h"

#include "ops/cuda_stream.h"
#include "ops/vector.cuh"

namespace megabagel {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;

// Maximum and sum of exponentials relative to it, of the values seen so far.
struct Running {
  float maximum = -INFINITY;
  float sum = 0.f;

  __device__ __forceinline__ void raise(float to) {
    if (to > maximum) {
      sum *= __expf(maximum - to);
      maximum = to;
    }
  }

  __device__ __forceinline__ void merge(float other_maximum, float other_sum) {
    raise(other_maximum);
    // a part without a value adds nothing; its maximum is not a number to subtract from
    sum += other_maximum == -INFINITY ? other_sum : other_sum * __expf(other_maximum - maximum);
  }
};

__device__ __forceinline__ void merge_warp(Running& mine) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    const float maximum = __shfl_xor_sync(0xffffffffu, mine.maximum, distance);
    const float sum = __shfl_xor_sync(0xffffffffu, mine.sum, distance);
    mine.merge(maximum, sum);
  }
}

template <typename T, int N>
__global__ void __launch_bounds__(kThreads)
    statistics_kernel(const T* logits, const int64_t* labels, float* out, int64_t rows, int64_t classes) {
  __shared__ float maxima[kWarps], sums[kWarps];
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const T* x = logits + row * classes;
    Running mine;
    for (int64_t column = int64_t(threadIdx.x) * N; column < classes; column += kThreads * N) {
      const Vector<T, N> values = load<T, N>(x + column);
      float highest = to_float(values.values[0]);
#pragma unroll
      for (int j = 1; j < N; ++j) {
        highest = fmaxf(highest, to_float(values.values[j]));
      }
      mine.raise(highest);
      const float base = mine.maximum == -INFINITY ? 0.f : mine.maximum;
#pragma unroll
      for (int j = 0; j < N; ++j) {
        mine.sum += __expf(to_float(values.values[j]) - base);
      }
    }
    merge_warp(mine);
    if (threadIdx.x % 32 == 0) {
      maxima[threadIdx.x / 32] = mine.maximum;
      sums[threadIdx.x / 32] = mine.sum;
    }
    __syncthreads();
    if (threadIdx.x < 32) {
      mine = Running{};
      if (threadIdx.x < kWarps) {
        mine.maximum = maxima[threadIdx.x];
        mine.sum = sums[threadIdx.x];
      }
      merge_warp(mine);
      if (threadIdx.x == 0) {
        const int64_t label = labels[row];
        out[row] = mine.maximum;
        out[rows + row] = mine.sum;
        out[2 * rows + row] = label >= 0 && label < classes ? to_float(x[label]) : 0.f;
      }
    }
    __syncthreads();
  }
}

template <typename T, int N>
__global__ void __launch_bounds__(kThreads) gradient_kernel(T* logits, const int64_t* labels, const float* normalizers,
                                                            const float* weights, int64_t rows, int64_t classes) {
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    T* x = logits + row * classes;
    const int64_t label = labels[row];
    const float normalizer = normalizers[row], weight = weights[row];
    for (int64_t column = int64_t(threadIdx.x) * N; column < classes; column += kThreads * N) {
      Vector<T, N> values = load<T, N>(x + column);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const float power = to_float(values.values[j]) - normalizer;
        values.values[j] = from_float<T>((column + j == label ? expm1f(power) : __expf(power)) * weight);
      }
      store(x + column, values);
    }
  }
}

unsigned blocks(int64_t rows) { return static_cast<unsigned>(std::min<int64_t>(rows, 1 << 30)); }

Tensor statistics_cuda(const Tensor& logits, const Tensor& labels) {
  const char* op = "cross_entropy_statistics";
  check_logits(op, logits, labels);
  const int64_t rows = logits.size(0), classes = logits.size(1);
  Tensor out = torch::stable::new_empty(logits, {3, rows}, ScalarType::Float);
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device());
  dispatch_vector(op, logits, classes, [&](auto zero, auto size) {
    using T = decltype(zero);
    constexpr int N = decltype(size)::value;
    if (rows > 0) {
      statistics_kernel<T, N><<<blocks(rows), kThreads, 0, current_stream(logits.get_device())>>>(
          static_cast<const T*>(logits.const_data_ptr()), labels.const_data_ptr<int64_t>(),
          out.mutable_data_ptr<float>(), rows, classes);
    }
  });
  check_launch(op);
  return out;
}

void gradient_cuda(Tensor& logits, const Tensor& labels, const Tensor& log_normalizer, const Tensor& weights) {
  const char* op = "cross_entropy_gradient_";
  check_logits(op, logits, labels);
  check_per_row(op, "log_normalizer", log_normalizer, logits);
  check_per_row(op, "weights", weights, logits);
  const int64_t rows = logits.size(0), classes = logits.size(1);
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device());
  dispatch_vector(op, logits, classes, [&](auto zero, auto size) {
    using T = decltype(zero);
    constexpr int N = decltype(size)::value;
    if (rows > 0) {
      gradient_kernel<T, N><<<blocks(rows), kThreads, 0, current_stream(logits.get_device())>>>(
          static_cast<T*>(logits.mutable_data_ptr()), labels.const_data_ptr<int64_t>(),
          log_normalizer.const_data_ptr<float>(), weights.const_data_ptr<float>(), rows, classes);
    }
  });
  check_launch(op);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(megabagel, CUDA, m) {
  m.impl("cross_entropy_statistics", TORCH_BOX(&statistics_cuda));
  m.impl("cross_entropy_gradient_", TORCH_BOX(&gradient_cuda));
}

}  // namespace megabagel
