// What the CPU and CUDA kernels of the cross-entropy check alike, each failure one sentence.
#pragma once

#include "ops/common.h"

namespace megabagel {

// Statistics are float32, of float64 logits float64.
inline ScalarType statistics_type(const Tensor& logits) {
  return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_logits(const char* op, const Tensor& logits, const Tensor& labels) {
  STD_TORCH_CHECK(is_float(logits), op, ": logits must be float32, bfloat16 or float64.");
  STD_TORCH_CHECK(logits.dim() == 2 && logits.size(1) > 0 && logits.is_contiguous(), op,
                  ": logits must be contiguous [rows, classes] with at least one class.");
  check_index(op, "labels", labels, logits);
  STD_TORCH_CHECK(labels.size(0) == logits.size(0) && labels.is_contiguous(), op, ": labels must be contiguous, one for ",
                  "each of the ", logits.size(0), " rows of logits.");
}

inline void check_per_row(const char* op, const char* name, const Tensor& values, const Tensor& logits) {
  STD_TORCH_CHECK(values.dim() == 1 && values.size(0) == logits.size(0) && values.is_contiguous() &&
                      values.scalar_type() == statistics_type(logits) && values.get_device() == logits.get_device(),
                  op, ": ", name, " must be contiguous on the device of the logits, one for each of their ",
                  logits.size(0), " rows, float32 (float64 for float64 logits).");
}

}  // namespace megabagel
