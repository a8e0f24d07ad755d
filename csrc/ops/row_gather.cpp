// Rows taken from a table, on the CPU: threads share the rows of the result, each is written once.
#include "ops/row_gather.h"

#include <cstring>

#include "ops/simd.h"

namespace megabagel {
namespace {

template <typename From, typename To>
MEGABAGEL_CLONES void convert(const From* from, To* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    to[i] = static_cast<To>(from[i]);
  }
}

template <typename From, typename To>
void gather(const From* x, int64_t stride, int64_t width, const int64_t* index, int64_t count, To* out) {
  torch::stable::parallel_for(0, count, kGrain / std::max<int64_t>(width, 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (index[i] < 0) {
        std::memset(static_cast<void*>(out + i * width), 0, width * sizeof(To));
      } else if constexpr (std::is_same_v<From, To>) {
        std::memcpy(static_cast<void*>(out + i * width), x + index[i] * stride, width * sizeof(To));
      } else {
        convert(x + index[i] * stride, out + i * width, width);
      }
    }
  });
}

}  // namespace

Tensor gather_rows(const char* op, const char* name, const Tensor& x, const Tensor& index, ScalarType dtype,
                   int64_t least) {
  STD_TORCH_CHECK(is_float(x) && is_float(dtype), op, ": values must be float32, bfloat16 or float64.");
  check_index(op, name, index, x);
  const Table table = table_of(op, x);
  const Tensor rows = torch::stable::contiguous(index);
  check_entries(op, name, rows.const_data_ptr<int64_t>(), rows.numel(), least, x.size(0));
  Tensor out = empty_rows(x, rows.numel(), dtype);
  if (out.numel() > 0) {
    dispatch_float(op, x, [&](auto from) {
      dispatch_float(op, out, [&](auto to) {
        gather(table.x.const_data_ptr<decltype(from)>(), table.x.stride(0), table.width,
               rows.const_data_ptr<int64_t>(), rows.numel(), out.mutable_data_ptr<decltype(to)>());
      });
    });
  }
  return out;
}

}  // namespace megabagel
