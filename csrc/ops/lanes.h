// Loop bodies that the compiler vectorises inside a function with clones: conversions, sums and an exp, written without
// branches and without an order that it must keep.
#pragma once

#include <cstdint>
#include <type_traits>

#include "ops/common.h"
#include "ops/simd.h"

// For templates and lambdas: the attribute for clones is for plain functions, which call them.
#define MEGABAGEL_INLINE inline __attribute__((always_inline))

namespace megabagel {

// What a value is computed in: double for double, else float.
template <typename T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename To, typename From>
MEGABAGEL_INLINE To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

template <typename T>
MEGABAGEL_INLINE Wide<T> widen(T x) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return bits<float>(static_cast<uint32_t>(x.x) << 16);
  } else {
    return x;
  }
}

// Rounds to nearest, ties to even.
template <typename T>
MEGABAGEL_INLINE T narrow(Wide<T> x) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    const uint32_t u = bits<uint32_t>(x);
    const uint32_t rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16;
    return bits<BFloat16>(static_cast<uint16_t>(x != x ? 0x7fc0 : rounded));
  } else {
    return x;
  }
}

// exp(x) to 2e-7 relative, for every float: inf above 88.8, 0 below -104, NaN for NaN.
// x = n ln2 + r; exp(r) by its Taylor polynomial on |r| <= ln2 / 2; 2^n in two factors, as it may be denormal or inf.
MEGABAGEL_INLINE float fast_exp(float x) {
  x = x > 89.f ? 89.f : x;
  x = x < -104.f ? -104.f : x;
  const float shifted = x * 1.44269504f + 12582912.f;  // 1.5 * 2^23: the integer n stands in the low bits
  const float n = shifted - 12582912.f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.f / 5040;
  p = p * r + 1.f / 720;
  p = p * r + 1.f / 120;
  p = p * r + 1.f / 24;
  p = p * r + 1.f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.f;
  p = p * r + 1.f;
  const int32_t exponent = bits<int32_t>(shifted) - bits<int32_t>(12582912.f);
  const int32_t half = exponent >> 1;
  return p * bits<float>((half + 127) << 23) * bits<float>((exponent - half + 127) << 23);
}

// exp(x) to 1e-15 relative. Plain: float64 is there for checks of gradients, not for speed.
MEGABAGEL_INLINE double fast_exp(double x) { return __builtin_exp(x); }

// f(0) + ... + f(count - 1) in 16 partial sums, the same on every machine.
template <typename A, typename F>
MEGABAGEL_INLINE A sum_lanes(int64_t count, F f) {
  constexpr int kLanes = 16;
  A lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += f(i + lane);
  }
  for (int lane = 0; i < count; ++i, ++lane) lanes[lane] += f(i);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  }
  return lanes[0];
}

}  // namespace megabagel
