// swiglu on the CPU: out[i, j] = silu(x[i, j]) * x[i, width + j] (Shazeer 2020), and its gradient, one pass each.
#include <cmath>

#include "ops/common.h"

namespace megabagel {
namespace {

void check(const char* op, const Tensor& x) {
  STD_TORCH_CHECK(is_float(x), op, ": values must be float32, bfloat16 or float64.");
  STD_TORCH_CHECK(x.dim() == 2 && x.size(1) % 2 == 0, op, ": x must have two dimensions, the last one even.");
  STD_TORCH_CHECK(x.is_contiguous(), op, ": x must be contiguous.");
}

Tensor swiglu(const Tensor& x) {
  check("swiglu", x);
  const int64_t rows = x.size(0), width = x.size(1) / 2;
  Tensor out = torch::stable::new_empty(x, {rows, width});
  dispatch_float("swiglu", x, [&](auto zero) {
    using T = decltype(zero);
    using A = std::conditional_t<std::is_same_v<T, double>, double, float>;
    const T* in = x.const_data_ptr<T>();
    T* to = out.mutable_data_ptr<T>();
    torch::stable::parallel_for(0, rows, kGrain / std::max<int64_t>(width, 1) + 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const T* gate = in + i * 2 * width;
        for (int64_t j = 0; j < width; ++j) {
          const A g = gate[j], u = gate[width + j];
          to[i * width + j] = static_cast<T>(g / (A(1) + std::exp(-g)) * u);
        }
      }
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
    using A = std::conditional_t<std::is_same_v<T, double>, double, float>;
    const T* in = x.const_data_ptr<T>();
    const T* from = grad.const_data_ptr<T>();
    T* to = out.mutable_data_ptr<T>();
    torch::stable::parallel_for(0, rows, kGrain / std::max<int64_t>(width, 1) + 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const T* gate = in + i * 2 * width;
        T* d = to + i * 2 * width;
        for (int64_t j = 0; j < width; ++j) {
          const A g = gate[j], u = gate[width + j], dy = from[i * width + j];
          const A s = A(1) / (A(1) + std::exp(-g));
          d[j] = static_cast<T>(dy * u * s * (A(1) + g * (A(1) - s)));
          d[width + j] = static_cast<T>(dy * g * s);
        }
      }
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
