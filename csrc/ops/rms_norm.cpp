// rms_norm on the CPU: y = x * r * weight, r = 1 / sqrt(mean(x^2) + eps) (Zhang and Sennrich 2019), and its gradients.
#include <cmath>

#include "ops/partial_sums.h"

namespace megabagel {
namespace {

void check(const char* op, const Tensor& x, const Tensor& weight) {
  STD_TORCH_CHECK(is_float(x), op, ": values must be float32, bfloat16 or float64.");
  STD_TORCH_CHECK(x.dim() == 2 && x.is_contiguous(), op, ": x must be contiguous with two dimensions.");
  STD_TORCH_CHECK(weight.dim() == 1 && weight.size(0) == x.size(1) && weight.is_contiguous() &&
                      weight.scalar_type() == x.scalar_type(),
                  op, ": the weight must be contiguous [", x.size(1), "] of the type of x.");
}

ScalarType wide_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

template <typename T, typename A>
MEGABAGEL_INLINE void forward_row(const T* __restrict x, const T* __restrict weight, T* __restrict to, A* rstd,
                                  int64_t width, A eps) {
  const A squares = sum_lanes<A>(width, [&](int64_t j) __attribute__((always_inline)) {
    const A v = widen(x[j]);
    return v * v;
  });
  const A r = 1 / std::sqrt(squares / width + eps);
  *rstd = r;
  for (int64_t j = 0; j < width; ++j) to[j] = narrow<T>(widen(x[j]) * r * widen(weight[j]));
}

// dx = r * (w dy) - x * r^3 / width * sum(w dy x); d_weight += dy x r.
template <typename T, typename A>
MEGABAGEL_INLINE void backward_row(const T* __restrict grad, const T* __restrict x, const T* __restrict weight, A r,
                                   T* __restrict dx, A* __restrict d_weight, int64_t width) {
  const A dot = sum_lanes<A>(width, [&](int64_t j) __attribute__((always_inline)) {
    return widen(grad[j]) * widen(weight[j]) * widen(x[j]);
  });
  const A scale = dot * r * r * r / width;
  for (int64_t j = 0; j < width; ++j) {
    const A v = widen(x[j]), dy = widen(grad[j]);
    dx[j] = narrow<T>(dy * widen(weight[j]) * r - v * scale);
    d_weight[j] += dy * v * r;
  }
}

#define MEGABAGEL_RMS_NORM_ROWS(T)                                                                                 \
  MEGABAGEL_CLONES void forward_rows(const T* x, const T* weight, T* to, Wide<T>* rstd, int64_t begin, int64_t end, \
                                     int64_t width, Wide<T> eps) {                                                 \
    for (int64_t i = begin; i < end; ++i) {                                                                        \
      forward_row(x + i * width, weight, to + i * width, rstd + i, width, eps);                                    \
    }                                                                                                              \
  }                                                                                                                \
  MEGABAGEL_CLONES void backward_rows(const T* grad, const T* x, const T* weight, const Wide<T>* rstd, T* dx,      \
                                      Wide<T>* d_weight, int64_t begin, int64_t end, int64_t width) {              \
    for (int64_t i = begin; i < end; ++i) {                                                                        \
      backward_row(grad + i * width, x + i * width, weight, rstd[i], dx + i * width, d_weight, width);             \
    }                                                                                                              \
  }

MEGABAGEL_RMS_NORM_ROWS(float)
MEGABAGEL_RMS_NORM_ROWS(double)
MEGABAGEL_RMS_NORM_ROWS(BFloat16)

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  check("rms_norm", x, weight);
  const int64_t rows = x.size(0), width = x.size(1);
  Tensor out = torch::stable::empty_like(x);
  Tensor rstd = torch::stable::new_empty(x, {rows}, wide_type(x));
  dispatch_float("rms_norm", x, [&](auto zero) {
    using T = decltype(zero);
    const T *from = x.const_data_ptr<T>(), *w = weight.const_data_ptr<T>();
    T* to = out.mutable_data_ptr<T>();
    Wide<T>* r = rstd.mutable_data_ptr<Wide<T>>();
    torch::stable::parallel_for(0, rows, kGrain / std::max<int64_t>(width, 1) + 1, [&](int64_t begin, int64_t end) {
      forward_rows(from, w, to, r, begin, end, width, static_cast<Wide<T>>(eps));
    });
  });
  return {out, rstd};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                             const Tensor& rstd) {
  check("rms_norm_backward", x, weight);
  const int64_t rows = x.size(0), width = x.size(1);
  STD_TORCH_CHECK(grad.dim() == 2 && grad.size(0) == rows && grad.size(1) == width && grad.is_contiguous() &&
                      grad.scalar_type() == x.scalar_type(),
                  "rms_norm_backward: the gradient must be contiguous [", rows, ", ", width, "] of the type of x.");
  STD_TORCH_CHECK(rstd.dim() == 1 && rstd.size(0) == rows && rstd.is_contiguous() && rstd.scalar_type() == wide_type(x),
                  "rms_norm_backward: rstd must be what the forward pass gave, [", rows, "].");
  Tensor dx = torch::stable::empty_like(x), d_weight = torch::stable::empty_like(weight);
  Tensor partials = torch::stable::new_zeros(x, {partial_sums(rows), width}, wide_type(x));
  dispatch_float("rms_norm_backward", x, [&](auto zero) {
    using T = decltype(zero);
    const T *dy = grad.const_data_ptr<T>(), *from = x.const_data_ptr<T>(), *w = weight.const_data_ptr<T>();
    const Wide<T>* r = rstd.const_data_ptr<Wide<T>>();
    T* to = dx.mutable_data_ptr<T>();
    Wide<T>* sums = partials.mutable_data_ptr<Wide<T>>();
    for_each_block(rows, [&](int64_t block, int64_t begin, int64_t end) {
      backward_rows(dy, from, w, r, to, sums + block * width, begin, end, width);
    });
    add_partials(sums, partials.size(0), width, d_weight.mutable_data_ptr<T>());
  });
  return {dx, d_weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(megabagel, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)");
  m.def("rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor rstd) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(megabagel, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
}

}  // namespace megabagel
