// Checks of stream_split and stream_merge on both devices: each index has an entry for every row of the other's side.
#pragma once

#include "ops/row_gather.h"

namespace megabagel {

// split: x [L, ...] in sequence order; merge: x [R, ...], rows of the streams. `back` [rows of x] is the gradient's index.
inline void check_way_back(const char* op, const char* name, const Tensor& x, const Tensor& back) {
  check_index(op, name, back, x);
  STD_TORCH_CHECK(x.dim() >= 1 && back.numel() == x.size(0), op, ": ", name, " has ", back.numel(),
                  " entries and must have one for each row of x.");
}

}  // namespace megabagel
