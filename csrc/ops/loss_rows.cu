// loss_row_gather and its gradient on CUDA.
#include "ops/loss_rows.h"

#include "ops/cuda_stream.h"
#include "ops/vector.cuh"

namespace megabagel {
namespace {

constexpr int kThreads = 256;

__global__ void invert_kernel(const int64_t* rows, int64_t entries, int64_t count, int64_t* inverse) {
  for (int64_t i = blockIdx.x * int64_t(kThreads) + threadIdx.x; i < entries; i += int64_t(gridDim.x) * kThreads) {
    if (rows[i] >= 0 && rows[i] < count) {
      inverse[rows[i]] = i;
    }
  }
}

Tensor loss_row_gather_cuda(const Tensor& x, const Tensor& rows) {
  return gather_rows_cuda("loss_row_gather", "rows", x, rows, x.scalar_type());
}

Tensor loss_row_scatter_cuda(const Tensor& grad, const Tensor& rows, int64_t count) {
  check_scatter(grad, rows, count);
  const torch::stable::accelerator::DeviceGuard guard(grad.get_device());
  const Tensor index = torch::stable::contiguous(rows);
  const int64_t entries = index.numel();
  Tensor inverse = torch::stable::new_empty(index, {count});
  torch::stable::fill_(inverse, -1);
  if (entries > 0) {
    invert_kernel<<<grid(entries, kThreads), kThreads, 0, current_stream(grad.get_device())>>>(
        index.const_data_ptr<int64_t>(), entries, count, inverse.mutable_data_ptr<int64_t>());
  }
  check_launch("loss_row_scatter");
  return gather_rows_cuda("loss_row_scatter", "rows", grad, inverse, grad.scalar_type());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(megabagel, CUDA, m) {
  m.impl("loss_row_gather", TORCH_BOX(&loss_row_gather_cuda));
  m.impl("loss_row_scatter", TORCH_BOX(&loss_row_scatter_cuda));
}

}  // namespace megabagel
