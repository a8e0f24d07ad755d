// kv_gather and its gradients on CUDA: a group of lanes holds one head in registers, float32 inside, 16 bytes per load,
// sums in a fixed order.
#include "ops/kv_gather.h"

#include "ops/alignment.h"
#include "ops/cuda_stream.h"
#include "ops/partial_sums.cuh"

namespace megabagel {
namespace {

constexpr int kThreads = 128;
constexpr int64_t kMaxHeadDim = 256;

// A head [2, half] is spread over `lanes` lanes (a power of two up to 32): lane i holds N values at i N, and K - 1 times
// again `lanes` N further, of each half.
struct Layout {
  int half, lanes;
};

// Sums over the lanes of a head; all lanes of the warp must take part.
__device__ __forceinline__ float sum_over_head(float x, int lanes) {
  for (int distance = lanes / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(~0u, x, distance);
  return x;
}

// What one lane holds of a head.
template <int N, int K>
struct Part {
  float a[K][N], b[K][N];  // of the first and of the second half

  template <typename F>
  static __device__ __forceinline__ void for_each(const Layout& at, int lane, F&& f) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const int column = (k * at.lanes + lane) * N;
      if (column < at.half) f(k, column);
    }
  }

  template <typename T>
  __device__ __forceinline__ void read(const T* from, const Layout& at, int lane) {
    for_each(at, lane, [&](int k, int column) {
      const Vector<T, N> first = load<T, N>(from + column), second = load<T, N>(from + at.half + column);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        a[k][j] = to_float(first.values[j]);
        b[k][j] = to_float(second.values[j]);
      }
    });
  }

  template <typename T>
  __device__ __forceinline__ void write(T* to, const Layout& at, int lane) const {
    for_each(at, lane, [&](int k, int column) {
      Vector<T, N> first, second;
#pragma unroll
      for (int j = 0; j < N; ++j) {
        first.values[j] = from_float<T>(a[k][j]);
        second.values[j] = from_float<T>(b[k][j]);
      }
      store(to + column, first);
      store(to + at.half + column, second);
    });
  }

  // The pair of each column turned by the angle with this cosine and sine, or back by it.
  template <bool Back>
  __device__ __forceinline__ void rotate(const float* cos, const float* sin, const Layout& at, int lane) {
    constexpr int M = N < 4 ? N : 4;  // floats in 16 bytes
    for_each(at, lane, [&](int k, int column) {
#pragma unroll
      for (int from = 0; from < N; from += M) {
        const Vector<float, M> c = load<float, M>(cos + column + from), s = load<float, M>(sin + column + from);
#pragma unroll
        for (int j = 0; j < M; ++j) {
          const float first = a[k][from + j], second = b[k][from + j], sine = Back ? -s.values[j] : s.values[j];
          a[k][from + j] = first * c.values[j] - second * sine;
          b[k][from + j] = second * c.values[j] + first * sine;
        }
      }
    });
  }

  __device__ __forceinline__ float dot(const Part& other, const Layout& at, int lane) const {
    float sum = 0.f;
    for_each(at, lane, [&](int k, int) {
#pragma unroll
      for (int j = 0; j < N; ++j) sum += a[k][j] * other.a[k][j] + b[k][j] * other.b[k][j];
    });
    return sum_over_head(sum, at.lanes);
  }

  // Every value becomes f(value, that of `other`).
  template <typename F>
  __device__ __forceinline__ void update(const Part& other, F&& f) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
#pragma unroll
      for (int j = 0; j < N; ++j) {
        a[k][j] = f(a[k][j], other.a[k][j]);
        b[k][j] = f(b[k][j], other.b[k][j]);
      }
    }
  }
};

// Where a head of the mixed row stands: `heads` query heads of a group, then its key, then its value.
struct Head {
  int group, place;  // place: 0 .. heads - 1 query, heads key, heads + 1 value
  __device__ Head(int head, int heads) : group(head / (heads + 2)), place(head % (heads + 2)) {}
};

template <typename T>
struct Streams {
  const T *und, *gen;
  const T *und_q, *und_k, *gen_q, *gen_k;  // weights of the norms; null: not normalised
};

// A block per row of the result; each group of lanes takes heads of it in turn.
template <typename T, int N, int K>
__global__ void forward_kernel(Streams<T> in, const float* cos, const float* sin, const int64_t* order, T* q, T* k,
                               T* v, KvSizes s, Layout at, float eps) {
  const int lane = threadIdx.x % at.lanes, heads = static_cast<int>(s.heads), all = static_cast<int>(s.groups) * (heads + 2);
  for (int64_t row = blockIdx.x; row < s.count; row += gridDim.x) {
    const int64_t source = order[row];
    const bool absent = source < 0 || source >= s.und_rows + s.gen_rows, in_gen = source >= s.und_rows;
    const T* from = in_gen ? in.gen + (source - s.und_rows) * s.width() : in.und + source * s.width();
    const T *q_weight = in_gen ? in.gen_q : in.und_q, *k_weight = in_gen ? in.gen_k : in.und_k;
    for (int first = 0; first < all; first += kThreads / at.lanes) {
      const int index = first + threadIdx.x / at.lanes;
      const bool active = index < all;  // the others only take part in sums
      const Head head(index, heads);
      const bool rotated = active && head.place <= heads;
      const T* weight = !rotated || absent ? nullptr : head.place < heads ? q_weight : k_weight;
      Part<N, K> x = {};
      if (active && !absent) x.read(from + index * s.d, at, lane);
      const float r = rsqrtf(x.dot(x, at, lane) / s.d + eps);
      if (weight != nullptr) {
        Part<N, K> w = {};
        w.read(weight, at, lane);
        x.update(w, [&](float value, float scale) { return value * r * scale; });
      }
      if (!active) continue;
      T* to = v + (row * s.groups + head.group) * s.d;
      if (rotated) {
        x.template rotate<false>(cos + row * at.half, sin + row * at.half, at, lane);
        to = head.place < heads ? q + ((row * s.groups + head.group) * heads + head.place) * s.d
                                : k + (row * s.groups + head.group) * s.d;
      }
      x.write(to, at, lane);
    }
  }
}

// Leaves the sums over the groups of lanes of this block in to [d], in a fixed order.
template <int N, int K>
__device__ __forceinline__ void add_over_block(const Part<N, K>& part, float* shared, float* to, const Layout& at) {
  const int lane = threadIdx.x % at.lanes, group = threadIdx.x / at.lanes, d = 2 * at.half;
  Part<N, K>::for_each(at, lane, [&](int k, int column) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      shared[group * d + column + j] = part.a[k][j];
      shared[group * d + at.half + column + j] = part.b[k][j];
    }
  });
  __syncthreads();
  for (int column = threadIdx.x; column < d; column += kThreads) {
    float sum = 0.f;
    for (int g = 0; g < kThreads / at.lanes; ++g) sum += shared[g * d + column];
    to[column] = sum;
  }
  __syncthreads();
}

// Blocks 0 .. und_blocks - 1 share the rows of und, the others those of gen. A block takes rows in turn, its groups of
// lanes heads of them; partials [blocks, 2, d] gets its sums for the weights of query and key heads.
template <typename T, int N, int K>
__global__ void backward_kernel(Streams<T> in, const T* dq, const T* dk, const T* dv, const float* cos,
                                const float* sin, const int64_t* inverse, T* d_und, T* d_gen, float* partials,
                                int und_blocks, KvSizes s, Layout at, float eps) {
  extern __shared__ float shared[];  // [groups of lanes, d]
  const bool in_gen = static_cast<int>(blockIdx.x) >= und_blocks;
  const int64_t rows = in_gen ? s.gen_rows : s.und_rows, blocks = in_gen ? gridDim.x - und_blocks : und_blocks;
  const T* stream = in_gen ? in.gen : in.und;
  T* d_stream = in_gen ? d_gen : d_und;
  const int64_t* back = inverse + (in_gen ? s.und_rows : 0);
  const T *q_weight = in_gen ? in.gen_q : in.und_q, *k_weight = in_gen ? in.gen_k : in.und_k;
  const int lane = threadIdx.x % at.lanes, heads = static_cast<int>(s.heads), all = static_cast<int>(s.groups) * (heads + 2);
  Part<N, K> q_sums = {}, k_sums = {};
  for (int64_t row = blockIdx.x - (in_gen ? und_blocks : 0); row < rows; row += blocks) {
    const int64_t i = back[row];
    const bool absent = i < 0 || i >= s.count;
    for (int first = 0; first < all; first += kThreads / at.lanes) {
      const int index = first + threadIdx.x / at.lanes;
      const Head head(index, heads);
      const bool active = index < all, rotated = active && head.place <= heads, query = head.place < heads;
      const T* weight = !rotated || absent ? nullptr : query ? q_weight : k_weight;
      Part<N, K> g = {}, x = {}, w = {};
      if (active && !absent) {
        const int64_t kv = (i * s.groups + head.group) * s.d;
        g.read(query ? dq + kv * heads + head.place * s.d : rotated ? dk + kv : dv + kv, at, lane);
        if (rotated) g.template rotate<true>(cos + i * at.half, sin + i * at.half, at, lane);
        if (weight != nullptr) {
          x.read(stream + row * s.width() + index * s.d, at, lane);
          w.read(weight, at, lane);
        }
      }
      const float r = rsqrtf(x.dot(x, at, lane) / s.d + eps);
      Part<N, K> to_weight = x;
      to_weight.update(g, [&](float value, float grad) { return value * r * grad; });
      if (weight != nullptr) g.update(w, [&](float grad, float scale) { return grad * scale; });
      const float scale = g.dot(x, at, lane) * r * r * r / s.d;
      if (weight != nullptr) {
        g.update(x, [&](float grad, float value) { return grad * r - value * scale; });
        if (query) {
          q_sums.update(to_weight, [](float sum, float term) { return sum + term; });
        } else {
          k_sums.update(to_weight, [](float sum, float term) { return sum + term; });
        }
      }
      if (active) g.write(d_stream + row * s.width() + index * s.d, at, lane);
    }
  }
  if (partials != nullptr) {
    float* to = partials + blockIdx.x * 4 * int64_t(at.half);
    add_over_block(q_sums, shared, to, at);
    add_over_block(k_sums, shared, to + 2 * at.half, at);
  }
}

// Calls f(T{}, N, K, layout): 16 bytes per access where every address allows it, else single values.
template <typename F>
void dispatch_head(const char* op, const KvSizes& s, const Tensor& und, const std::vector<const Tensor*>& others,
                   F&& f) {
  STD_TORCH_CHECK(s.d <= kMaxHeadDim, op, ": head_dim must be at most ", kMaxHeadDim, " on CUDA.");
  const int half = static_cast<int>(s.d / 2);
  int64_t width = half;
  for (const Tensor* other : others) width = aligned_width(*other, width);
  dispatch_vector(op, und, width, [&](auto zero, auto size) {
    constexpr int N = decltype(size)::value;
    int lanes = 1;
    while (lanes < 32 && lanes * N < half) lanes *= 2;
    // 256 values of a head, half of them in vectors of at least 4: one for each of 32 lanes; else 4 single ones
    f(zero, size, std::integral_constant<int, N == 1 ? 4 : 1>{}, Layout{half, lanes});
  });
}

template <typename T>
const T* data(const std::optional<Tensor>& t) {
  return t ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
}

template <typename T>
Streams<T> streams_of(const Tensor& und, const Tensor& gen, const HeadNorms& norms) {
  return {static_cast<const T*>(und.const_data_ptr()),
          static_cast<const T*>(gen.const_data_ptr()),
          data<T>(norms[0]),
          data<T>(norms[1]),
          data<T>(norms[2]),
          data<T>(norms[3])};
}

std::vector<const Tensor*> with_norms(std::vector<const Tensor*> tensors, const HeadNorms& norms) {
  for (const auto& norm : norms) {
    if (norm) tensors.push_back(&*norm);
  }
  return tensors;
}

std::tuple<Tensor, Tensor, Tensor> kv_gather_cuda(const Tensor& und, const Tensor& gen,
                                                  const std::optional<Tensor>& und_q,
                                                  const std::optional<Tensor>& und_k,
                                                  const std::optional<Tensor>& gen_q,
                                                  const std::optional<Tensor>& gen_k, const Tensor& cos,
                                                  const Tensor& sin, const Tensor& order, const Tensor& inverse,
                                                  int64_t heads, int64_t d, double eps) {
  const HeadNorms norms{und_q, und_k, gen_q, gen_k};
  const KvSizes s = check_kv("kv_gather", und, gen, norms, cos, sin, heads, d);
  check_kv_order("kv_gather", order, inverse, und, s);
  const torch::stable::accelerator::DeviceGuard guard(und.get_device());
  Tensor q = torch::stable::new_empty(und, {s.count, s.groups * heads, d});
  Tensor k = torch::stable::new_empty(und, {s.count, s.groups, d}), v = torch::stable::empty_like(k);
  dispatch_head("kv_gather", s, und, with_norms({&gen, &cos, &sin}, norms), [&](auto zero, auto size, auto times, Layout at) {
    using T = decltype(zero);
    if (k.numel() == 0) return;
    forward_kernel<T, decltype(size)::value, decltype(times)::value>
        <<<grid(s.count, 1), kThreads, 0, current_stream(und.get_device())>>>(
            streams_of<T>(und, gen, norms), static_cast<const float*>(cos.const_data_ptr()),
            static_cast<const float*>(sin.const_data_ptr()), static_cast<const int64_t*>(order.const_data_ptr()),
            static_cast<T*>(q.mutable_data_ptr()), static_cast<T*>(k.mutable_data_ptr()),
            static_cast<T*>(v.mutable_data_ptr()), s, at, static_cast<float>(eps));
  });
  check_launch("kv_gather");
  return {q, k, v};
}

std::tuple<Tensor, Tensor, Tensor> kv_gather_backward_cuda(
    const Tensor& dq, const Tensor& dk, const Tensor& dv, const Tensor& und, const Tensor& gen,
    const std::optional<Tensor>& und_q, const std::optional<Tensor>& und_k, const std::optional<Tensor>& gen_q,
    const std::optional<Tensor>& gen_k, const Tensor& cos, const Tensor& sin, const Tensor& order,
    const Tensor& inverse, int64_t heads, int64_t d, double eps) {
  const HeadNorms norms{und_q, und_k, gen_q, gen_k};
  const KvSizes s = check_kv("kv_gather_backward", und, gen, norms, cos, sin, heads, d);
  check_kv_order("kv_gather_backward", order, inverse, und, s);
  check_kv_gradients(dq, dk, dv, und, s);
  const torch::stable::accelerator::DeviceGuard guard(und.get_device());
  Tensor d_und = torch::stable::empty_like(und), d_gen = torch::stable::empty_like(gen);
  Tensor d_norms = torch::stable::new_empty(und, {4, d});
  // blocks for each stream in proportion to its rows, and for a stream with rows at least one
  const int64_t rows = s.und_rows + s.gen_rows, most = 2 * kPartialSums;
  const auto blocks_for = [&](int64_t count) { return rows <= most ? count : (count * most + rows - 1) / rows; };
  const int64_t und_blocks = blocks_for(s.und_rows), gen_blocks = blocks_for(s.gen_rows);
  Tensor partials = torch::stable::new_empty(und, {und_blocks + gen_blocks, 2 * d}, ScalarType::Float);
  const auto others = with_norms({&gen, &cos, &sin, &dq, &dk, &dv}, norms);
  dispatch_head("kv_gather_backward", s, und, others, [&](auto zero, auto size, auto times, Layout at) {
    using T = decltype(zero);
    const cudaStream_t stream = current_stream(und.get_device());
    const bool has_norms = und_q || und_k || gen_q || gen_k;
    float* sums = static_cast<float*>(partials.mutable_data_ptr());
    if (rows > 0) {
      const size_t shared = kThreads / at.lanes * d * sizeof(float);
      backward_kernel<T, decltype(size)::value, decltype(times)::value>
          <<<static_cast<unsigned>(und_blocks + gen_blocks), kThreads, shared, stream>>>(
              streams_of<T>(und, gen, norms), static_cast<const T*>(dq.const_data_ptr()),
              static_cast<const T*>(dk.const_data_ptr()), static_cast<const T*>(dv.const_data_ptr()),
              static_cast<const float*>(cos.const_data_ptr()), static_cast<const float*>(sin.const_data_ptr()),
              static_cast<const int64_t*>(inverse.const_data_ptr()), static_cast<T*>(d_und.mutable_data_ptr()),
              static_cast<T*>(d_gen.mutable_data_ptr()), has_norms ? sums : nullptr, static_cast<int>(und_blocks), s,
              at, static_cast<float>(eps));
    }
    if (has_norms) {
      T* to = static_cast<T*>(d_norms.mutable_data_ptr());
      add_partials(sums, und_blocks, 2 * d, to, stream);
      add_partials(sums + und_blocks * 2 * d, gen_blocks, 2 * d, to + 2 * d, stream);
    }
  });
  check_launch("kv_gather_backward");
  return {d_und, d_gen, d_norms};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(megabagel, CUDA, m) {
  m.impl("kv_gather", TORCH_BOX(&kv_gather_cuda));
  m.impl("kv_gather_backward", TORCH_BOX(&kv_gather_backward_cuda));
}

}  // namespace megabagel
