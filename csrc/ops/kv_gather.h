// kv_gather's sizes and the checks that its CPU and CUDA kernels share.
#pragma once

#include <array>

#include "ops/common.h"

namespace megabagel {

struct KvSizes {
  int64_t und_rows, gen_rows;  // of the streams
  int64_t count;               // rows of the result
  int64_t groups;              // key heads
  int64_t heads;               // query heads of each key head
  int64_t d;                   // values of a head
  constexpr int64_t width() const { return groups * (heads + 2) * d; }
};

using HeadNorms = std::array<std::optional<Tensor>, 4>;  // und q, und k, gen q, gen k; [d] each

inline KvSizes check_kv(const char* op, const Tensor& und, const Tensor& gen, const HeadNorms& norms, const Tensor& cos,
                        const Tensor& sin, int64_t heads, int64_t d) {
  STD_TORCH_CHECK(is_float(und), op, ": values must be float32, bfloat16 or float64.");
  STD_TORCH_CHECK(heads > 0 && d > 0 && d % 2 == 0, op, ": there must be query heads, and head_dim must be even.");
  for (const Tensor* stream : {&und, &gen}) {
    STD_TORCH_CHECK(stream->dim() == 2 && stream->is_contiguous() && stream->scalar_type() == und.scalar_type() &&
                        stream->get_device() == und.get_device() && stream->size(1) == und.size(1) &&
                        stream->size(1) % ((heads + 2) * d) == 0,
                    op, ": und and gen must be contiguous with two dimensions, of one type and device, and equally wide, ",
                    "a multiple of ", (heads + 2) * d, ".");
  }
  for (const auto& norm : norms) {
    STD_TORCH_CHECK(!norm || (norm->dim() == 1 && norm->size(0) == d && norm->is_contiguous() &&
                              norm->scalar_type() == und.scalar_type() && norm->get_device() == und.get_device()),
                    op, ": the weights of the norms must be contiguous [", d, "] of the type and on the device of und.");
  }
  for (const Tensor* table : {&cos, &sin}) {
    STD_TORCH_CHECK(table->dim() == 2 && table->size(0) == cos.size(0) && table->size(1) == d / 2 &&
                        table->is_contiguous() && table->scalar_type() == ScalarType::Float &&
                        table->get_device() == und.get_device(),
                    op, ": cos and sin must be contiguous float32 [", cos.dim() > 0 ? cos.size(0) : 0, ", ", d / 2,
                    "] on the device of und.");
  }
  return {und.size(0), gen.size(0), cos.size(0), und.size(1) / ((heads + 2) * d), heads, d};
}

// Shapes and types of the way there and back; their entries are the matter of each device.
inline void check_kv_order(const char* op, const Tensor& order, const Tensor& inverse, const Tensor& und,
                           const KvSizes& sizes) {
  check_index(op, "order", order, und);
  check_index(op, "inverse", inverse, und);
  const int64_t rows = sizes.und_rows + sizes.gen_rows;
  STD_TORCH_CHECK(order.is_contiguous() && inverse.is_contiguous() && order.numel() == sizes.count &&
                      inverse.numel() == rows,
                  op, ": order must be contiguous [", sizes.count, "] and inverse [", rows, "].");
}

inline void check_kv_gradients(const Tensor& dq, const Tensor& dk, const Tensor& dv, const Tensor& und,
                               const KvSizes& sizes) {
  for (const Tensor* grad : {&dq, &dk, &dv}) {
    const int64_t heads = grad == &dq ? sizes.groups * sizes.heads : sizes.groups;
    STD_TORCH_CHECK(grad->dim() == 3 && grad->size(0) == sizes.count && grad->size(1) == heads &&
                        grad->size(2) == sizes.d && grad->is_contiguous() && grad->scalar_type() == und.scalar_type() &&
                        grad->get_device() == und.get_device(),
                    "kv_gather_backward: a gradient must be contiguous [", sizes.count, ", ", heads, ", ", sizes.d,
                    "] of the type and on the device of und.");
  }
}

}  // namespace megabagel
