// swiglu on the CPU: out[i, j] = silu(x[i, j]) * x[i, width + j] (Shazeer 2020), and its gradient, one pass each.
#include "ops/lanes.h"

namespace megabagel {
namespace {

void check(const char* op, const Tensor& x) {
  STD_TORCH_CHECK(is_float(x), op, ": values must be float32, bfloat16 or float64.");
  STD_TORCH_CHECK(x.dim() == 2 && x.size(1) % 2 == 0, op, ": x must have two dimensions, the last one even.");
  STD_TORCH_CHECK(x.is_contiguous(), op, ": x must be contiguous.");
}

// One row: gate and up [width] -> to [width].
template <typename T>
MEGABAGEL_INLINE void forward_row(const T* __restrict gate, const T* __restrict up, T* __restrict to, int64_t width) {
  for (int64_t j = 0; j < width; ++j) {
    const Wide<T> g = widen(gate[j]);
    to[j] = narrow<T>(g / (1 + fast_exp(-g)) * widen(up[j]));
  }
}

template <typename T>
MEGABAGEL_INLINE void backward_row(const T* __restrict grad, const T* __restrict gate, const T* __restrict up,
                                   T* __restrict d_gate, T* __restrict d_up, int64_t width) {
  for (int64_t j = 0; j < width; ++j) {
    const Wide<T> g = widen(gate[j]), dy = widen(grad[j]), s = 1 / (1 + fast_exp(-g));
    d_gate[j] = narrow<T>(dy * widen(up[j]) * s * (1 + g * (1 - s)));
    d_up[j] = narrow<T>(dy * g * s);
  }
}

#define MEGABAGEL_SWIGLU_ROWS(T)                                                                               \
  MEGABAGEL_CLONES void forward_rows(const T* x, T* to, int64_t begin, int64_t end, int64_t width) {           \
    for (int64_t i = begin; i < end; ++i) {                                                                    \
      const T* gate = x + i * 2 * width;                                                                       \
      forward_row(gate, gate + width, to + i * width, width);                                                  \
    }                                                                                                          \
  }                                                                                                            \
  MEGABAGEL_CLONES void backward_rows(const T* grad, const T* x, T* to, int64_t begin, int64_t end,            \
                                      int64_t width) {                                                         \
    for (int64_t i = begin; i < end; ++i) {                                                                    \
      const int64_t at = i * 2 * width;                                                                        \
      backward_row(grad + i * width, x + at, x + at + width, to + at, to + at + width, width);                 \
    }                                                                                                          \
  }

MEGABAGEL_SWIGLU_ROWS(float)
MEGABAGEL_SWIGLU_ROWS(double)
MEGABAGEL_SWIGLU_ROWS(BFloat16)

int64_t rows_per_thread(int64_t width) { return kGrain / std::max<int64_t>(width, 1) + 1; }

Tensor swiglu(const Tensor& x) {
  check("swiglu", x);
  const int64_t rows = x.size(0), width = x.size(1) / 2;
  Tensor out = torch::stable::new_empty(x, {rows, width});
  dispatch_float("swiglu", x, [&](auto zero) {
    using T = decltype(zero);
    const T* in = x.const_data_ptr<T>();
    T* to = out.mutable_data_ptr<T>();
    torch::stable::parallel_for(0, rows, rows_per_thread(width), [&](int64_t begin, int64_t end) {
      forward_rows(in, to, begin, end, width);
    });
  });
  return out;
}

Tensor swiglu_backward(const Tensor& grad, const Tensor& x) {
  check("swiglu_backward", x);
  const int64_t rows = x.size(0), width = x.size(1) / 2;
  STD_TORCH_CHECK(grad.dim() == 2 && grad.size(0) == rows && grad.size(1) == width && grad.is_contiguous() &&
                      grad.scalar_type() == x.scalar_type(),
                  "swiglu_backward: the gradient must be contiguous [", rows, ", ", width, "] of the type of x.");
  Tensor out = torch::stable::empty_like(x);
  dispatch_float("swiglu_backward", x, [&](auto zero) {
    using T = decltype(zero);
    const T* in = x.const_data_ptr<T>();
    const T* from = grad.const_data_ptr<T>();
    T* to = out.mutable_data_ptr<T>();
    torch::stable::parallel_for(0, rows, rows_per_thread(width), [&](int64_t begin, int64_t end) {
      backward_rows(from, in, to, begin, end, width);
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(megabagel, m) {
  m.def("swiglu(Tensor x) -> Tensor");
  m.def("swiglu_backward(Tensor grad, Tensor x) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(megabagel, CPU, m) {
  m.impl("swiglu", TORCH_BOX(&swiglu));
  m.impl("swiglu_backward", TORCH_BOX(&swiglu_backward));
}

}  // namespace megabagel
