// Gradients of weights that every row adds to: the rows are cut into a fixed number of blocks, each block has a sum of
// its own, and the sums are added in order. The result does not depend on the number of threads.
#pragma once

#include <algorithm>

#include "ops/lanes.h"

namespace megabagel {

constexpr int64_t kPartialSums = 64;

inline int64_t partial_sums(int64_t rows) { return std::clamp<int64_t>(rows, 1, kPartialSums); }

// Calls f(block, first row, one behind the last row) for each block, the blocks spread over the threads.
template <typename F>
void for_each_block(int64_t rows, F&& f) {
  const int64_t blocks = partial_sums(rows);
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) f(b, rows * b / blocks, rows * (b + 1) / blocks);
  });
}

// Column sums of partials [blocks, width] -> to [width].
template <typename T>
void add_partials(const Wide<T>* partials, int64_t blocks, int64_t width, T* to) {
  for (int64_t j = 0; j < width; ++j) {
    Wide<T> sum = 0;
    for (int64_t b = 0; b < blocks; ++b) sum += partials[b * width + j];
    to[j] = narrow<T>(sum);
  }
}

}  // namespace megabagel
