// What every device op needs: argument checks that end in one sentence, and the CUDA stream of the caller.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace megabagel {

using torch::headeronly::BFloat16;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kGrain = 16384;  // elements below which a thread is not worth starting

inline bool is_float(const Tensor& t) {
  return t.scalar_type() == ScalarType::Float || t.scalar_type() == ScalarType::BFloat16 ||
         t.scalar_type() == ScalarType::Double;
}

inline void check_index(const char* op, const char* name, const Tensor& index, const Tensor& beside) {
  STD_TORCH_CHECK(index.scalar_type() == ScalarType::Long, op, ": ", name, " must be int64.");
  STD_TORCH_CHECK(index.dim() == 1, op, ": ", name, " must have one dimension, not ", index.dim(), ".");
  STD_TORCH_CHECK(index.is_cuda() == beside.is_cuda() && index.get_device() == beside.get_device(), op, ": ", name,
                  " must be on the device of the rows.");
}

// Every entry must lie in [least, bound). On the CPU only: on CUDA it would wait for the device, there a kernel treats
// other entries as absent rows.
inline void check_entries(const char* op, const char* name, const int64_t* index, int64_t count, int64_t least,
                          int64_t bound) {
  for (int64_t i = 0; i < count; ++i) {
    STD_TORCH_CHECK(index[i] >= least && index[i] < bound, op, ": ", name, "[", i, "] is ", index[i],
                    ", but must lie in ", least, " .. ", bound - 1, ".");
  }
}

// Calls f(T{}) with the C++ type of a floating-point tensor: float, double or BFloat16.
template <typename F>
auto dispatch_float(const char* op, const Tensor& t, F&& f) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Double:
      return f(double{});
    case ScalarType::BFloat16:
      return f(BFloat16{});
    default:
      STD_TORCH_CHECK(false, op, ": values must be float32, bfloat16 or float64.");
  }
}

}  // namespace megabagel
