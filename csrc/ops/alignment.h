// Whether 16 bytes may be read at once, for operators with more than one tensor that can be a view.
#pragma once

#include "ops/common.h"

namespace megabagel {

// A width that tells `dispatch_vector` to read one value at a time where `t` does not begin at a multiple of 16 bytes.
inline int64_t aligned_width(const Tensor& t, int64_t width) {
  return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0 ? width : 1;
}

}  // namespace megabagel
