// stream_split and stream_merge on the CPU: two gathers, each the other's gradient.
#include "ops/stream.h"

namespace megabagel {
namespace {

Tensor stream_split(const Tensor& x, const Tensor& inverse, const Tensor& order, ScalarType dtype) {
  check_way_back("stream_split", "order", x, order);
  return gather_rows("stream_split", "inverse", x, inverse, dtype);
}

Tensor stream_merge(const Tensor& x, const Tensor& order, const Tensor& inverse, ScalarType dtype) {
  check_way_back("stream_merge", "inverse", x, inverse);
  return gather_rows("stream_merge", "order", x, order, dtype, 0);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(megabagel, m) {
  m.def("stream_split(Tensor x, Tensor inverse, Tensor order, ScalarType dtype) -> Tensor");
  m.def("stream_merge(Tensor x, Tensor order, Tensor inverse, ScalarType dtype) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(megabagel, CPU, m) {
  m.impl("stream_split", TORCH_BOX(&stream_split));
  m.impl("stream_merge", TORCH_BOX(&stream_merge));
}

}  // namespace megabagel
