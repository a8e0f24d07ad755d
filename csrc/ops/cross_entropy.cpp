// Softmax cross-entropy over one shard of the classes, on the CPU: per row the maximum, the sum of exponentials and the
// label's logit in one pass through memory, and the gradient written over the logits. A label outside the shard belongs
// to another one: it picks nothing.
#include "ops/cross_entropy.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "ops/simd.h"

namespace megabagel {
namespace {

#define MEGABAGEL_INLINE inline __attribute__((always_inline))

constexpr int kLanes = 16;
constexpr int64_t kBlock = 1024;  // values that stay in the first cache between their maximum and their exponentials
using Lanes = float __attribute__((vector_size(4 * kLanes)));
using Bits = int32_t __attribute__((vector_size(4 * kLanes)));
using Halves = uint16_t __attribute__((vector_size(2 * kLanes)));

MEGABAGEL_INLINE void load(const float* from, Lanes& to) { std::memcpy(&to, from, sizeof to); }

MEGABAGEL_INLINE void load(const uint16_t* from, Lanes& to) {  // bfloat16: the upper half of a float32
  Halves halves;
  std::memcpy(&halves, from, sizeof halves);
  const Bits bits = __builtin_convertvector(halves, Bits) << 16;
  std::memcpy(&to, &bits, sizeof to);
}

MEGABAGEL_INLINE void store(float* to, const Lanes& from) { std::memcpy(to, &from, sizeof from); }

MEGABAGEL_INLINE void store(uint16_t* to, const Lanes& from) {
  Bits bits;
  std::memcpy(&bits, &from, sizeof bits);
  const Bits rounded = bits + 0x7fff + ((bits >> 16) & 1);  // to nearest, ties to even
  const Bits kept = from != from ? bits | 0x400000 : rounded;
  const Halves halves = __builtin_convertvector((kept >> 16) & 0xffff, Halves);
  std::memcpy(to, &halves, sizeof halves);
}

// exp(x) for x <= 0 or NaN: x = n log 2 + r with |r| <= log(2) / 2, then the Taylor series of exp(r) up to r^7, whose
// rest is a tenth of float32's rounding. Results below the normal numbers are 0.
MEGABAGEL_INLINE void exp_lanes(const Lanes& x, Lanes& out) {
  constexpr float shift = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer, held in the low bits
  const Lanes least = x < -87.f ? Lanes{} - 87.f : x;
  const Lanes shifted = least * 1.44269504088896341f + shift;
  const Lanes n = shifted - shift;
  const Lanes r = (least - n * 0.693359375f) + n * 2.12194440e-4f;  // log 2 in two parts, the first one exact
  Lanes sum = r * (1.f / 5040) + 1.f / 720;
  sum = sum * r + 1.f / 120;
  sum = sum * r + 1.f / 24;
  sum = sum * r + 1.f / 6;
  sum = sum * r + 0.5f;
  sum = sum * r + 1.f;
  sum = sum * r + 1.f;
  Bits power;
  std::memcpy(&power, &shifted, sizeof power);
  power = (power << 23) + (127 << 23);  // the integer part as a power of two; what lies above it is shifted out
  Lanes scale;
  std::memcpy(&scale, &power, sizeof scale);
  out = x < -87.f ? Lanes{} : sum * scale;
}

// The last lanes of a row, `rest` of them, the others filled with what adds nothing.
template <typename T>
MEGABAGEL_INLINE void load_rest(const T* from, int64_t rest, Lanes& to) {
  T values[kLanes] = {};
  std::memcpy(values, from, rest * sizeof(T));
  load(values, to);
  for (int64_t l = rest; l < kLanes; ++l) {
    to[l] = -std::numeric_limits<float>::infinity();
  }
}

template <typename T>
MEGABAGEL_INLINE void statistics_body(const T* x, int64_t count, float* maximum, float* sum) {
  float top = -std::numeric_limits<float>::infinity();
  double total = 0;
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t length = std::min(kBlock, count - begin), whole = length / kLanes * kLanes;
    const T* block = x + begin;
    Lanes rest, tops, value, power, powers = {};
    load_rest(block + whole, length - whole, rest);
    tops = rest;
    for (int64_t j = 0; j < whole; j += kLanes) {
      load(block + j, value);
      tops = value > tops ? value : tops;
    }
    float highest = top;
    for (int l = 0; l < kLanes; ++l) {
      highest = tops[l] > highest ? tops[l] : highest;
    }
    if (highest > top) {
      total *= std::exp(double(top) - highest);
      top = highest;
    }
    const float base = top == -std::numeric_limits<float>::infinity() ? 0.f : top;
    for (int64_t j = 0; j < whole; j += kLanes) {
      load(block + j, value);
      exp_lanes(value - base, power);
      powers += power;
    }
    exp_lanes(rest - base, power);
    powers += power;
    for (int l = 0; l < kLanes; ++l) {
      total += powers[l];
    }
  }
  *maximum = top;
  *sum = static_cast<float>(total);
}

template <typename T>
MEGABAGEL_INLINE void gradient_body(T* x, int64_t count, float log_normalizer, float weight) {
  const int64_t whole = count / kLanes * kLanes;
  Lanes value, power;
  for (int64_t j = 0; j < whole; j += kLanes) {
    load(x + j, value);
    exp_lanes(value - log_normalizer, power);
    store(x + j, power * weight);
  }
  if (whole < count) {
    T values[kLanes];
    load_rest(x + whole, count - whole, value);
    exp_lanes(value - log_normalizer, power);
    store(values, power * weight);
    std::memcpy(x + whole, values, (count - whole) * sizeof(T));
  }
}

MEGABAGEL_CLONES void row_statistics(const float* x, int64_t count, float* maximum, float* sum) {
  statistics_body(x, count, maximum, sum);
}

MEGABAGEL_CLONES void half_row_statistics(const uint16_t* x, int64_t count, float* maximum, float* sum) {
  statistics_body(x, count, maximum, sum);
}

MEGABAGEL_CLONES void row_gradient(float* x, int64_t count, float log_normalizer, float weight) {
  gradient_body(x, count, log_normalizer, weight);
}

MEGABAGEL_CLONES void half_row_gradient(uint16_t* x, int64_t count, float log_normalizer, float weight) {
  gradient_body(x, count, log_normalizer, weight);
}

template <typename T, typename A>
void statistics_of(const T* x, int64_t count, A* maximum, A* sum) {
  if constexpr (std::is_same_v<T, float>) {
    row_statistics(x, count, maximum, sum);
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    half_row_statistics(reinterpret_cast<const uint16_t*>(x), count, maximum, sum);
  } else {
    *maximum = *std::max_element(x, x + count);
    *sum = 0;
    for (int64_t j = 0; j < count; ++j) {
      *sum += std::exp(x[j] - *maximum);
    }
  }
}

template <typename T, typename A>
void gradient_of(T* x, int64_t count, A log_normalizer, A weight) {
  if constexpr (std::is_same_v<T, float>) {
    row_gradient(x, count, log_normalizer, weight);
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    half_row_gradient(reinterpret_cast<uint16_t*>(x), count, log_normalizer, weight);
  } else {
    for (int64_t j = 0; j < count; ++j) {
      x[j] = std::exp(x[j] - log_normalizer) * weight;
    }
  }
}

template <typename T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

Tensor statistics(const Tensor& logits, const Tensor& labels) {
  check_logits("cross_entropy_statistics", logits, labels);
  const int64_t rows = logits.size(0), classes = logits.size(1);
  Tensor out = torch::stable::new_empty(logits, {3, rows}, statistics_type(logits));
  dispatch_float("cross_entropy_statistics", logits, [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulator<T>;
    const T* x = logits.const_data_ptr<T>();
    const int64_t* label = labels.const_data_ptr<int64_t>();
    A* to = out.mutable_data_ptr<A>();
    torch::stable::parallel_for(0, rows, kGrain / classes + 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const T* row = x + i * classes;
        statistics_of(row, classes, to + i, to + rows + i);
        to[2 * rows + i] = label[i] >= 0 && label[i] < classes ? static_cast<A>(row[label[i]]) : A(0);
      }
    });
  });
  return out;
}

void gradient(Tensor& logits, const Tensor& labels, const Tensor& log_normalizer, const Tensor& weights) {
  const char* op = "cross_entropy_gradient_";
  check_logits(op, logits, labels);
  check_per_row(op, "log_normalizer", log_normalizer, logits);
  check_per_row(op, "weights", weights, logits);
  const int64_t rows = logits.size(0), classes = logits.size(1);
  dispatch_float(op, logits, [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulator<T>;
    T* x = logits.mutable_data_ptr<T>();
    const int64_t* label = labels.const_data_ptr<int64_t>();
    const A* normalizer = log_normalizer.const_data_ptr<A>();
    const A* weight = weights.const_data_ptr<A>();
    torch::stable::parallel_for(0, rows, kGrain / classes + 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        T* row = x + i * classes;
        const bool here = label[i] >= 0 && label[i] < classes;
        // expm1 keeps what is left of a label that is almost certain
        const A of_label = here ? std::expm1(static_cast<A>(row[label[i]]) - normalizer[i]) * weight[i] : A(0);
        gradient_of(row, classes, normalizer[i], weight[i]);
        if (here) {
          row[label[i]] = static_cast<T>(of_label);
        }
      }
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(megabagel, m) {
  m.def("cross_entropy_statistics(Tensor logits, Tensor labels) -> Tensor");
  m.def("cross_entropy_gradient_(Tensor(a!) logits, Tensor labels, Tensor log_normalizer, Tensor weights) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(megabagel, CPU, m) {
  m.impl("cross_entropy_statistics", TORCH_BOX(&statistics));
  m.impl("cross_entropy_gradient_", TORCH_BOX(&gradient));
}

}  // namespace megabagel
