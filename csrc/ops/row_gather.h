// Rows taken from a table: what stream_split, stream_merge and loss_row_gather have in common, forwards and backwards.
#pragma once

#include "ops/common.h"

namespace megabagel {

// [rows, ...], [count], int64 -> [count, ...] in `dtype`: row index[i] of x, zeros where index[i] is -1. What lies outside
// of `least` (-1, or 0 where no row may be absent) .. rows - 1 raises on the CPU and gives zeros on CUDA.
Tensor gather_rows(const char* op, const char* name, const Tensor& x, const Tensor& index, ScalarType dtype,
                   int64_t least = -1);
Tensor gather_rows_cuda(const char* op, const char* name, const Tensor& x, const Tensor& index, ScalarType dtype);

inline bool is_float(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Double;
}

// A table whose rows, `width` values each, lie stride(0) apart: x, or a copy of it where a row is not contiguous.
struct Table {
  Tensor x;
  int64_t width;
};

inline Table table_of(const char* op, const Tensor& x) {
  STD_TORCH_CHECK(x.dim() >= 1, op, ": x must have at least one dimension.");
  int64_t width = 1;
  bool contiguous = true;
  for (int64_t d = x.dim() - 1; d > 0; --d) {
    contiguous = contiguous && (x.size(d) == 1 || x.stride(d) == width);
    width *= x.size(d);
  }
  return {contiguous ? x : torch::stable::contiguous(x), width};
}

inline Tensor empty_rows(const Tensor& x, int64_t count, ScalarType dtype) {
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes[0] = count;
  return torch::stable::new_empty(x, sizes, dtype);
}

}  // namespace megabagel
