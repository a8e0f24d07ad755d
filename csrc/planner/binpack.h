// Which sample goes next into the pack being filled, as a function of token counts alone. megabagel/packing/binpack.py
// says the same in Python and moves the samples; `pack_sequence` plays it through for a known sequence.
#pragma once

#include <cstdint>
#include <vector>

namespace megabagel::planner {

enum class Strategy { kGreedy, kBestFit };

struct Limits {
  int64_t expected_num_tokens, max_num_tokens, prefer_buffer_before, max_buffer_size;
};

constexpr int64_t kDraw = -1, kClose = -2;

// Index of the waiting sample to take, kDraw or kClose. `fill`: tokens in the open pack, 0 when it is empty. `waiting`:
// token counts, oldest sample first. `can_draw` is false when no sample is left.
int64_t decide(Strategy strategy, const Limits& limits, int64_t fill, const std::vector<int64_t>& waiting,
               bool can_draw = true);

// The pack number of each sample when samples are drawn in this order, and a mandatory group's next sample is its first
// unused one. Throws std::invalid_argument when a sample does not fit into a pack or the limits contradict themselves.
std::vector<int64_t> pack_sequence(Strategy strategy, const Limits& limits, const std::vector<int64_t>& lengths,
                                   const std::vector<int64_t>& groups, const std::vector<int64_t>& mandatory);

}  // namespace megabagel::planner
