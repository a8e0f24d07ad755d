// flow_mix on the CPU: latent pictures become tokens on the path of rectified flow, and their target, in one pass.
#include "ops/flow.h"

#include <algorithm>
#include <tuple>

#include "ops/simd.h"

namespace megabagel {
namespace {

constexpr int64_t kRun = 32;  // tokens brought into patch order at once; they stay in the nearest cache

// Clean values come in `target`, which becomes noise - x0.
template <typename T>
MEGABAGEL_CLONES void mix(const float* noise, float t, float* target, T* noised, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const float x = target[i], n = noise[i];
    noised[i] = static_cast<T>((1 - t) * x + t * n);
    target[i] = n - x;
  }
}

struct Picture {
  int64_t start;  // its first token
  int64_t rows;
  int64_t columns;
};

std::vector<Picture> pictures_of(const Tensor& grids, const FlowSizes& sizes) {
  const Tensor contiguous = torch::stable::contiguous(grids);
  const int64_t* grid = contiguous.const_data_ptr<int64_t>();
  std::vector<Picture> pictures;
  int64_t start = 0;
  for (int64_t i = 0; i < sizes.pictures; ++i) {
    const int64_t rows = grid[2 * i], columns = grid[2 * i + 1], left = sizes.tokens - start;
    STD_TORCH_CHECK(rows >= 0 && columns >= 0 && (columns == 0 || rows <= left / columns), "flow_mix: grid ", i,
                    " of ", rows, " x ", columns, " tokens is no part of ", sizes.tokens, " tokens.");
    pictures.push_back({start, rows, columns});
    start += rows * columns;
  }
  STD_TORCH_CHECK(start == sizes.tokens, "flow_mix: the grids hold ", start, " tokens, but there are ", sizes.tokens,
                  ".");
  return pictures;
}

// Tokens `token` .. `token` + count of one row of a picture, in patch order.
void patch_order(const float* latents, const Picture& picture, const FlowSizes& sizes, int64_t token, int64_t count,
                 float* out) {
  const int64_t p = sizes.patch, local = token - picture.start;
  const int64_t row = local / picture.columns, column = local % picture.columns;
  const int64_t across = picture.columns * p, plane = picture.rows * p * across;
  for (int64_t channel = 0; channel < sizes.channels; ++channel) {
    for (int64_t y = 0; y < p; ++y) {
      const float* from = latents + picture.start * sizes.width + channel * plane + (row * p + y) * across + column * p;
      float* to = out + y * p * sizes.channels + channel;
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t x = 0; x < p; ++x) {
          to[i * sizes.width + x * sizes.channels] = from[i * p + x];
        }
      }
    }
  }
}

template <typename T>
void flow_range(const float* latents, const std::vector<Picture>& pictures, const FlowSizes& sizes, const float* noise,
                const float* times, int64_t begin, int64_t end, T* noised, float* target) {
  const int64_t d = sizes.width;
  const auto first = std::upper_bound(pictures.begin(), pictures.end(), begin,
                                      [](int64_t token, const Picture& picture) { return token < picture.start; });
  for (auto picture = first - 1; begin < end; ++picture) {
    const int64_t stop = std::min(end, picture->start + picture->rows * picture->columns);
    while (begin < stop) {
      const int64_t to_row_end = picture->columns - (begin - picture->start) % picture->columns;
      const int64_t count = std::min({kRun, to_row_end, stop - begin});
      patch_order(latents, *picture, sizes, begin, count, target + begin * d);
      for (int64_t token = begin; token < begin + count; ++token) {
        mix(noise + token * d, times[token], target + token * d, noised + token * d, d);
      }
      begin += count;
    }
  }
}

std::tuple<Tensor, Tensor> flow_mix(const Tensor& latents, const Tensor& grids, const Tensor& noise,
                                    const Tensor& times, int64_t patch_size, ScalarType dtype) {
  const FlowSizes sizes = flow_sizes(latents, grids, noise, times, patch_size, dtype);
  const std::vector<Picture> pictures = pictures_of(grids, sizes);
  const Tensor clean = torch::stable::contiguous(latents), drawn = torch::stable::contiguous(noise),
               when = torch::stable::contiguous(times);
  Tensor noised = torch::stable::new_empty(noise, {sizes.tokens, sizes.width}, dtype);
  Tensor target = torch::stable::new_empty(noise, {sizes.tokens, sizes.width});
  const auto run = [&](auto* out) {
    float* velocity = target.mutable_data_ptr<float>();
    torch::stable::parallel_for(0, sizes.tokens, kGrain / sizes.width + 1, [&](int64_t begin, int64_t end) {
      flow_range(clean.const_data_ptr<float>(), pictures, sizes, drawn.const_data_ptr<float>(),
                 when.const_data_ptr<float>(), begin, end, out, velocity);
    });
  };
  if (dtype == ScalarType::Float) {
    run(noised.mutable_data_ptr<float>());
  } else {
    run(noised.mutable_data_ptr<BFloat16>());
  }
  return {noised, target};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(megabagel, m) {
  m.def(
      "flow_mix(Tensor latents, Tensor grids, Tensor noise, Tensor times, int patch_size, ScalarType dtype) -> "
      "(Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(megabagel, CPU, m) { m.impl("flow_mix", TORCH_BOX(&flow_mix)); }

}  // namespace megabagel
