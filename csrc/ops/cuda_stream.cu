#include "ops/cuda_stream.h"

#include <dlfcn.h>

namespace megabagel {

cudaStream_t current_stream(int32_t device) {
  using GetStream = int32_t (*)(int32_t, void**);
  static const GetStream get_stream = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<GetStream>(library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr);
  }();
  STD_TORCH_CHECK(get_stream != nullptr, "this torch has no CUDA; install a CUDA build of torch or use CPU tensors.");
  void* stream = nullptr;
  STD_TORCH_CHECK(get_stream(device, &stream) == 0, "torch did not tell its current CUDA stream.");
  return static_cast<cudaStream_t>(stream);
}

}  // namespace megabagel
