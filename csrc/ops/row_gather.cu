// Rows taken from a table, on CUDA: a row of threads copies a row, 16 bytes per access of the narrower type.
#include "ops/cuda_stream.h"
#include "ops/row_gather.h"
#include "ops/vector.cuh"

namespace megabagel {
namespace {

constexpr int kThreads = 256;

template <typename To, typename From>
__device__ __forceinline__ To convert(From value) {
  if constexpr (std::is_same_v<To, From>) {
    return value;
  } else {
    return from_float<To>(to_float(value));
  }
}

template <typename From, typename To, int N>
__global__ void kernel(const From* x, int64_t rows, int64_t stride, int64_t width, const int64_t* index, int64_t count,
                       To* out) {
  const int64_t step = int64_t(gridDim.x) * blockDim.y;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.y + threadIdx.y; i < count; i += step) {
    const int64_t source = index[i];
    const bool present = source >= 0 && source < rows;
    for (int64_t column = threadIdx.x * N; column < width; column += blockDim.x * N) {
      Vector<To, N> result;
      if (present) {
        const Vector<From, N> values = load<From, N>(x + source * stride + column);
#pragma unroll
        for (int j = 0; j < N; ++j) {
          result.values[j] = convert<To>(values.values[j]);
        }
      } else {
#pragma unroll
        for (int j = 0; j < N; ++j) {
          result.values[j] = from_float<To>(0.f);
        }
      }
      store(out + i * width + column, result);
    }
  }
}

template <typename From, typename To, int N>
void launch(const Tensor& x, int64_t width, const Tensor& index, Tensor& out) {
  const int64_t per_row = width / N, count = index.numel();
  unsigned across = 1;
  while (across < per_row && across < kThreads) {
    across *= 2;
  }
  const dim3 block(across, kThreads / across);
  kernel<From, To, N><<<grid(count, block.y), block, 0, current_stream(x.get_device())>>>(
      static_cast<const From*>(x.const_data_ptr()), x.size(0), x.stride(0), width, index.const_data_ptr<int64_t>(),
      count, static_cast<To*>(out.mutable_data_ptr()));
}

template <typename From, typename To>
void gather(const Tensor& x, int64_t width, const Tensor& index, Tensor& out) {
  constexpr int N = 16 / std::min(sizeof(From), sizeof(To));
  const bool aligned = reinterpret_cast<uintptr_t>(x.const_data_ptr()) % (N * sizeof(From)) == 0;
  if (aligned && width % N == 0 && x.stride(0) % N == 0) {
    launch<From, To, N>(x, width, index, out);
  } else {
    launch<From, To, 1>(x, width, index, out);
  }
}

template <typename F>
void dispatch(const char* op, ScalarType type, F&& f) {
  if (type == ScalarType::Float) {
    f(float{});
  } else if (type == ScalarType::BFloat16) {
    f(__nv_bfloat16{});
  } else {
    STD_TORCH_CHECK(false, op, ": values must be float32 or bfloat16 on CUDA.");
  }
}

}  // namespace

Tensor gather_rows_cuda(const char* op, const char* name, const Tensor& x, const Tensor& index, ScalarType dtype) {
  check_index(op, name, index, x);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device());
  const Table table = table_of(op, x);
  const Tensor rows = torch::stable::contiguous(index);
  Tensor out = empty_rows(x, rows.numel(), dtype);
  dispatch(op, x.scalar_type(), [&](auto from) {
    dispatch(op, dtype, [&](auto to) {
      if (out.numel() > 0) {
        gather<decltype(from), decltype(to)>(table.x, table.width, rows, out);
      }
    });
  });
  check_launch(op);
  return out;
}

}  // namespace megabagel
