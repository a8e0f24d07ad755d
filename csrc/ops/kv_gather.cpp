// kv_gather on the CPU: rows of both streams in another order, their query and key heads normalised (RMSNorm, Zhang and
// Sennrich 2019) and rotated (RoPE in the rotate-half form, Su et al. 2021), and its gradients.
#include "ops/kv_gather.h"

#include <cmath>
#include <cstring>

#include "ops/partial_sums.h"

namespace megabagel {
namespace {

// 1 / sqrt(mean(x^2) + eps) over a head of d values.
template <typename T, typename A>
MEGABAGEL_INLINE A reciprocal_rms(const T* __restrict x, int64_t d, A eps) {
  const A squares = sum_lanes<A>(d, [&](int64_t j) __attribute__((always_inline)) {
    const A v = widen(x[j]);
    return v * v;
  });
  return 1 / std::sqrt(squares / d + eps);
}

// One head [d]; weight may be null: not normalised then.
template <typename T, typename A>
MEGABAGEL_INLINE void forward_head(const T* __restrict x, const T* __restrict weight, const float* __restrict cos,
                                   const float* __restrict sin, T* __restrict to, int64_t d, A eps) {
  const int64_t half = d / 2;
  if (weight == nullptr) {
    for (int64_t j = 0; j < half; ++j) {
      const A a = widen(x[j]), b = widen(x[half + j]);
      to[j] = narrow<T>(a * cos[j] - b * sin[j]);
      to[half + j] = narrow<T>(b * cos[j] + a * sin[j]);
    }
    return;
  }
  const A r = reciprocal_rms<T, A>(x, d, eps);
  for (int64_t j = 0; j < half; ++j) {
    const A a = widen(x[j]) * r * widen(weight[j]), b = widen(x[half + j]) * r * widen(weight[half + j]);
    to[j] = narrow<T>(a * cos[j] - b * sin[j]);
    to[half + j] = narrow<T>(b * cos[j] + a * sin[j]);
  }
}

// The rotation turned back gives the normalised head's gradient g; dx = r g w - x r^3 / d sum(g w x), d_weight += g x r.
template <typename T, typename A>
MEGABAGEL_INLINE void backward_head(const T* __restrict grad, const T* __restrict x, const T* __restrict weight,
                                    const float* __restrict cos, const float* __restrict sin, T* __restrict dx,
                                    A* __restrict d_weight, int64_t d, A eps) {
  const int64_t half = d / 2;
  if (weight == nullptr) {
    for (int64_t j = 0; j < half; ++j) {
      const A a = widen(grad[j]), b = widen(grad[half + j]);
      dx[j] = narrow<T>(a * cos[j] + b * sin[j]);
      dx[half + j] = narrow<T>(b * cos[j] - a * sin[j]);
    }
    return;
  }
  const A r = reciprocal_rms<T, A>(x, d, eps);
  const A dot = sum_lanes<A>(half, [&](int64_t j) __attribute__((always_inline)) {
    const A a = widen(grad[j]), b = widen(grad[half + j]);
    const A wa = widen(weight[j]) * widen(x[j]), wb = widen(weight[half + j]) * widen(x[half + j]);
    return (a * cos[j] + b * sin[j]) * wa + (b * cos[j] - a * sin[j]) * wb;
  });
  const A scale = dot * r * r * r / d;
  for (int64_t j = 0; j < half; ++j) {
    const A a = widen(grad[j]), b = widen(grad[half + j]), xa = widen(x[j]), xb = widen(x[half + j]);
    const A ga = a * cos[j] + b * sin[j], gb = b * cos[j] - a * sin[j];
    dx[j] = narrow<T>(ga * widen(weight[j]) * r - xa * scale);
    dx[half + j] = narrow<T>(gb * widen(weight[half + j]) * r - xb * scale);
    d_weight[j] += ga * xa * r;
    d_weight[half + j] += gb * xb * r;
  }
}

template <typename T>
MEGABAGEL_INLINE void forward_row(const T* from, const T* q_weight, const T* k_weight, const float* cos,
                                  const float* sin, T* q, T* k, T* v, const KvSizes& s, Wide<T> eps) {
  for (int64_t g = 0; g < s.groups; ++g) {
    for (int64_t h = 0; h < s.heads; ++h, from += s.d, q += s.d) {
      forward_head<T, Wide<T>>(from, q_weight, cos, sin, q, s.d, eps);
    }
    forward_head<T, Wide<T>>(from, k_weight, cos, sin, k + g * s.d, s.d, eps);
    std::memcpy(static_cast<void*>(v + g * s.d), from + s.d, s.d * sizeof(T));
    from += 2 * s.d;
  }
}

template <typename T>
MEGABAGEL_INLINE void backward_row(const T* from, const T* q_weight, const T* k_weight, const float* cos,
                                   const float* sin, const T* dq, const T* dk, const T* dv, T* to, Wide<T>* d_weights,
                                   const KvSizes& s, Wide<T> eps) {
  for (int64_t g = 0; g < s.groups; ++g) {
    for (int64_t h = 0; h < s.heads; ++h, from += s.d, to += s.d, dq += s.d) {
      backward_head<T, Wide<T>>(dq, from, q_weight, cos, sin, to, d_weights, s.d, eps);
    }
    backward_head<T, Wide<T>>(dk + g * s.d, from, k_weight, cos, sin, to, d_weights + s.d, s.d, eps);
    std::memcpy(static_cast<void*>(to + s.d), dv + g * s.d, s.d * sizeof(T));
    from += 2 * s.d;
    to += 2 * s.d;
  }
}

#define MEGABAGEL_KV_ROWS(T)                                                                                        \
  MEGABAGEL_CLONES void one_row(const T* from, const T* q_weight, const T* k_weight, const float* cos,              \
                                const float* sin, T* q, T* k, T* v, const KvSizes& s, Wide<T> eps) {                \
    forward_row<T>(from, q_weight, k_weight, cos, sin, q, k, v, s, eps);                                            \
  }                                                                                                                 \
  MEGABAGEL_CLONES void one_row_backward(const T* from, const T* q_weight, const T* k_weight, const float* cos,     \
                                         const float* sin, const T* dq, const T* dk, const T* dv, T* to,            \
                                         Wide<T>* d_weights, const KvSizes& s, Wide<T> eps) {                       \
    backward_row<T>(from, q_weight, k_weight, cos, sin, dq, dk, dv, to, d_weights, s, eps);                         \
  }

MEGABAGEL_KV_ROWS(float)
MEGABAGEL_KV_ROWS(double)
MEGABAGEL_KV_ROWS(BFloat16)

template <typename T>
const T* data(const std::optional<Tensor>& t) {
  return t ? t->const_data_ptr<T>() : nullptr;
}

void check_order(const char* op, const Tensor& order, const Tensor& inverse, const Tensor& und, const KvSizes& s) {
  check_kv_order(op, order, inverse, und, s);
  const int64_t rows = s.und_rows + s.gen_rows;
  const int64_t *at = order.const_data_ptr<int64_t>(), *back = inverse.const_data_ptr<int64_t>();
  check_entries(op, "order", at, s.count, 0, rows);
  check_entries(op, "inverse", back, rows, -1, s.count);
  for (int64_t i = 0; i < s.count; ++i) {
    STD_TORCH_CHECK(back[at[i]] == i, op, ": order[", i, "] is ", at[i], ", but inverse leads back to ", back[at[i]],
                    ".");
  }
}

std::tuple<Tensor, Tensor, Tensor> kv_gather(const Tensor& und, const Tensor& gen, const std::optional<Tensor>& und_q,
                                             const std::optional<Tensor>& und_k, const std::optional<Tensor>& gen_q,
                                             const std::optional<Tensor>& gen_k, const Tensor& cos, const Tensor& sin,
                                             const Tensor& order, const Tensor& inverse, int64_t heads, int64_t d,
                                             double eps) {
  const HeadNorms norms{und_q, und_k, gen_q, gen_k};
  const KvSizes s = check_kv("kv_gather", und, gen, norms, cos, sin, heads, d);
  check_order("kv_gather", order, inverse, und, s);
  Tensor q = torch::stable::new_empty(und, {s.count, s.groups * heads, d});
  Tensor k = torch::stable::new_empty(und, {s.count, s.groups, d}), v = torch::stable::empty_like(k);
  dispatch_float("kv_gather", und, [&](auto zero) {
    using T = decltype(zero);
    const T *streams[] = {und.const_data_ptr<T>(), gen.const_data_ptr<T>()};
    const T *q_weights[] = {data<T>(und_q), data<T>(gen_q)}, *k_weights[] = {data<T>(und_k), data<T>(gen_k)};
    const float *c = cos.const_data_ptr<float>(), *n = sin.const_data_ptr<float>();
    const int64_t *at = order.const_data_ptr<int64_t>(), kv = s.groups * d;
    T *to_q = q.mutable_data_ptr<T>(), *to_k = k.mutable_data_ptr<T>(), *to_v = v.mutable_data_ptr<T>();
    torch::stable::parallel_for(0, s.count, kGrain / (s.width() + 1) + 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const bool in_gen = at[i] >= s.und_rows;
        const T* from = streams[in_gen] + (at[i] - (in_gen ? s.und_rows : 0)) * s.width();
        one_row(from, q_weights[in_gen], k_weights[in_gen], c + i * (d / 2), n + i * (d / 2), to_q + i * heads * kv,
                to_k + i * kv, to_v + i * kv, s, static_cast<Wide<T>>(eps));
      }
    });
  });
  return {q, k, v};
}

// Gradients of und, gen and of the four weights, [4, d] in the order of the arguments.
std::tuple<Tensor, Tensor, Tensor> kv_gather_backward(
    const Tensor& dq, const Tensor& dk, const Tensor& dv, const Tensor& und, const Tensor& gen,
    const std::optional<Tensor>& und_q, const std::optional<Tensor>& und_k, const std::optional<Tensor>& gen_q,
    const std::optional<Tensor>& gen_k, const Tensor& cos, const Tensor& sin, const Tensor& order,
    const Tensor& inverse, int64_t heads, int64_t d, double eps) {
  const HeadNorms norms{und_q, und_k, gen_q, gen_k};
  const KvSizes s = check_kv("kv_gather_backward", und, gen, norms, cos, sin, heads, d);
  check_order("kv_gather_backward", order, inverse, und, s);
  check_kv_gradients(dq, dk, dv, und, s);
  Tensor d_und = torch::stable::empty_like(und), d_gen = torch::stable::empty_like(gen);
  Tensor d_norms = torch::stable::new_empty(und, {4, d});
  const auto wide = und.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  dispatch_float("kv_gather_backward", und, [&](auto zero) {
    using T = decltype(zero);
    const T *from_q = dq.const_data_ptr<T>(), *from_k = dk.const_data_ptr<T>(), *from_v = dv.const_data_ptr<T>();
    const float *c = cos.const_data_ptr<float>(), *n = sin.const_data_ptr<float>();
    const int64_t kv = s.groups * d;
    const auto one_stream = [&](const Tensor& stream, const int64_t* back, const T* q_weight, const T* k_weight,
                                Tensor& d_stream, T* d_weights) {
      const int64_t rows = stream.size(0);
      Tensor partials = torch::stable::new_zeros(und, {partial_sums(rows), 2 * d}, wide);
      const T* x = stream.const_data_ptr<T>();
      T* dx = d_stream.mutable_data_ptr<T>();
      Wide<T>* sums = partials.mutable_data_ptr<Wide<T>>();
      for_each_block(rows, [&](int64_t block, int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
          const int64_t i = back[row];
          if (i < 0) {
            std::memset(static_cast<void*>(dx + row * s.width()), 0, s.width() * sizeof(T));
          } else {
            one_row_backward(x + row * s.width(), q_weight, k_weight, c + i * (d / 2), n + i * (d / 2),
                             from_q + i * heads * kv, from_k + i * kv, from_v + i * kv, dx + row * s.width(),
                             sums + block * 2 * d, s, static_cast<Wide<T>>(eps));
          }
        }
      });
      add_partials(sums, partials.size(0), 2 * d, d_weights);
    };
    const int64_t* back = inverse.const_data_ptr<int64_t>();
    T* d_weights = d_norms.mutable_data_ptr<T>();
    one_stream(und, back, data<T>(und_q), data<T>(und_k), d_und, d_weights);
    one_stream(gen, back + s.und_rows, data<T>(gen_q), data<T>(gen_k), d_gen, d_weights + 2 * d);
  });
  return {d_und, d_gen, d_norms};
}

}  // namespace

#define MEGABAGEL_KV_ARGUMENTS                                                                                   \
  "Tensor und, Tensor gen, Tensor? und_q, Tensor? und_k, Tensor? gen_q, Tensor? gen_k, Tensor cos, Tensor sin, " \
  "Tensor order, Tensor inverse, int heads_per_kv_head, int head_dim, float eps) -> (Tensor, Tensor, Tensor)"

STABLE_TORCH_LIBRARY_FRAGMENT(megabagel, m) {
  m.def("kv_gather(" MEGABAGEL_KV_ARGUMENTS);
  m.def("kv_gather_backward(Tensor dq, Tensor dk, Tensor dv, " MEGABAGEL_KV_ARGUMENTS);
}

STABLE_TORCH_LIBRARY_IMPL(megabagel, CPU, m) {
  m.impl("kv_gather", TORCH_BOX(&kv_gather));
  m.impl("kv_gather_backward", TORCH_BOX(&kv_gather_backward));
}

}  // namespace megabagel
