// loss_row_gather on the CPU, and its gradient: the rows go back to where they came from, zeros everywhere else.
#include "ops/loss_rows.h"

namespace megabagel {
namespace {

// Increasing rows are distinct, so that the gradient of a row has one term and the backward pass is a gather too.
void check_increasing(const char* op, const Tensor& rows) {
  const int64_t* row = rows.const_data_ptr<int64_t>();
  int64_t last = -1;
  for (int64_t i = 0; i < rows.numel(); ++i) {
    if (row[i] != -1) {
      STD_TORCH_CHECK(row[i] > last, op, ": rows[", i, "] is ", row[i], " behind ", last,
                      ", but rows must be 0 or more and increase, except for those that are -1.");
      last = row[i];
    }
  }
}

Tensor loss_row_gather(const Tensor& x, const Tensor& rows) {
  check_index("loss_row_gather", "rows", rows, x);
  const Tensor index = torch::stable::contiguous(rows);
  check_increasing("loss_row_gather", index);
  return gather_rows("loss_row_gather", "rows", x, index, x.scalar_type());
}

Tensor loss_row_scatter(const Tensor& grad, const Tensor& rows, int64_t count) {
  check_scatter(grad, rows, count);
  const Tensor index = torch::stable::contiguous(rows);
  check_increasing("loss_row_scatter", index);
  check_entries("loss_row_scatter", "rows", index.const_data_ptr<int64_t>(), index.numel(), -1, count);
  Tensor inverse = torch::stable::new_empty(index, {count});
  int64_t* where = inverse.mutable_data_ptr<int64_t>();
  std::fill_n(where, count, -1);
  const int64_t* row = index.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < index.numel(); ++i) {
    if (row[i] >= 0) {
      where[row[i]] = i;
    }
  }
  return gather_rows("loss_row_scatter", "rows", grad, inverse, grad.scalar_type());
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(megabagel, m) {
  m.def("loss_row_gather(Tensor x, Tensor rows) -> Tensor");
  m.def("loss_row_scatter(Tensor grad, Tensor rows, int count) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(megabagel, CPU, m) {
  m.impl("loss_row_gather", TORCH_BOX(&loss_row_gather));
  m.impl("loss_row_scatter", TORCH_BOX(&loss_row_scatter));
}

}  // namespace megabagel
