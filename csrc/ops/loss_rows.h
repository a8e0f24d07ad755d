// The sizes of loss_row_gather's backward pass, checked once for both devices.
#pragma once

#include "ops/row_gather.h"

namespace megabagel {

inline void check_scatter(const Tensor& grad, const Tensor& rows, int64_t count) {
  check_index("loss_row_scatter", "rows", rows, grad);
  STD_TORCH_CHECK(grad.dim() >= 1 && grad.size(0) == rows.numel(), "loss_row_scatter: ", rows.numel(),
                  " rows need a gradient of as many rows.");
  STD_TORCH_CHECK(count >= 0, "loss_row_scatter: a table cannot have ", count, " rows.");
}

}  // namespace megabagel
