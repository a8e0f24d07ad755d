// What flow_mix takes, checked once for both devices.
#pragma once

#include "ops/common.h"

namespace megabagel {

// x_t and the target of latent tokens; d = patch_size^2 * channels values of a token, in the order row, column, channel.
struct FlowSizes {
  int64_t tokens;
  int64_t width;  // d
  int64_t patch;
  int64_t channels;
  int64_t pictures;
};

inline FlowSizes flow_sizes(const Tensor& latents, const Tensor& grids, const Tensor& noise, const Tensor& times,
                            int64_t patch_size, ScalarType dtype) {
  for (const Tensor* t : {&latents, &noise, &times}) {
    STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float, "flow_mix: latents, noise and times must be float32.");
    STD_TORCH_CHECK(t->is_cuda() == grids.is_cuda() && t->get_device() == grids.get_device(),
                    "flow_mix: latents, grids, noise and times must be on one device.");
  }
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16,
                  "flow_mix: the result can be float32 or bfloat16.");
  STD_TORCH_CHECK(grids.scalar_type() == ScalarType::Long && grids.dim() == 2 && grids.size(1) == 2,
                  "flow_mix: grids must be int64 [pictures, 2].");
  STD_TORCH_CHECK(noise.dim() == 2 && latents.dim() == 1 && latents.numel() == noise.numel() && times.dim() == 1 &&
                      times.numel() == noise.size(0),
                  "flow_mix: noise [G, d] needs latents [G * d] and times [G].");
  const int64_t width = noise.size(1);
  STD_TORCH_CHECK(patch_size > 0 && width > 0 && width % (patch_size * patch_size) == 0, "flow_mix: ", width,
                  " values of a token do not divide into patches of ", patch_size, " x ", patch_size, ".");
  return {noise.size(0), width, patch_size, width / (patch_size * patch_size), grids.size(0)};
}

}  // namespace megabagel
