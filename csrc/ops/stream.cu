// stream_split and stream_merge on CUDA.
#include "ops/stream.h"

namespace megabagel {
namespace {

Tensor stream_split_cuda(const Tensor& x, const Tensor& inverse, const Tensor& order, ScalarType dtype) {
  check_way_back("stream_split", "order", x, order);
  return gather_rows_cuda("stream_split", "inverse", x, inverse, dtype);
}

Tensor stream_merge_cuda(const Tensor& x, const Tensor& order, const Tensor& inverse, ScalarType dtype) {
  check_way_back("stream_merge", "inverse", x, inverse);
  return gather_rows_cuda("stream_merge", "order", x, order, dtype);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(megabagel, CUDA, m) {
  m.impl("stream_split", TORCH_BOX(&stream_split_cuda));
  m.impl("stream_merge", TORCH_BOX(&stream_merge_cuda));
}

}  // namespace megabagel
