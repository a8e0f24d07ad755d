// Loads and stores of 16 bytes, and the choice of how many values of a type make them.
#pragma once

#include <cuda_bf16.h>

#include <algorithm>
#include <type_traits>

#include "ops/common.h"

namespace megabagel {

template <typename T, int N>
struct alignas(sizeof(T) * N) Vector {
  T values[N];
};

template <typename T, int N>
__device__ __forceinline__ Vector<T, N> load(const T* from) {
  return *reinterpret_cast<const Vector<T, N>*>(from);
}

template <typename T, int N>
__device__ __forceinline__ void store(T* to, const Vector<T, N>& vector) {
  *reinterpret_cast<Vector<T, N>*>(to) = vector;
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else {
    return __float2bfloat16(x);
  }
}

// Blocks for `count` independent items: enough to fill any GPU, each thread loops over what is left.
inline unsigned grid(int64_t count, int threads) {
  return static_cast<unsigned>(std::min<int64_t>((count + threads - 1) / threads, 132 * 32));
}

// Calls f(T{}, integral_constant<N>) with the CUDA type of x (float or bfloat16) and N values per access: 16 bytes where
// `width`, the length of a contiguous run, and the address of x allow it, else one value. Tensors that torch allocates
// begin at multiples of 16 bytes; x is the only one that may be a view.
template <typename F>
void dispatch_vector(const char* op, const Tensor& x, int64_t width, F&& f) {
  const bool aligned = reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0;
  if (x.scalar_type() == ScalarType::Float) {
    if (aligned && width % 4 == 0) {
      f(float{}, std::integral_constant<int, 4>{});
    } else {
      f(float{}, std::integral_constant<int, 1>{});
    }
  } else if (x.scalar_type() == ScalarType::BFloat16) {
    if (aligned && width % 8 == 0) {
      f(__nv_bfloat16{}, std::integral_constant<int, 8>{});
    } else {
      f(__nv_bfloat16{}, std::integral_constant<int, 1>{});
    }
  } else {
    STD_TORCH_CHECK(false, op, ": values must be float32 or bfloat16 on CUDA.");
  }
}

}  // namespace megabagel
