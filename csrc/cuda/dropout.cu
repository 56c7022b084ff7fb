// Dropout: one pass over memory, its random numbers computed on the way.
#include "dropout.h"

#include "common.cuh"
#include "philox.h"

namespace fastlm::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 4;  // independent 16-byte loads in flight per thread

template <class T>
__global__ void __launch_bounds__(kThreads)
    dropout_kernel(const T* x, T* y, int64_t n, const int64_t* seed, uint32_t drop_below, double keep_scale, bool aligned) {
  using C = compute_t<T>;
  constexpr int kWords = kVector<T> < 4 ? kVector<T> : 4;  // of a block of random words, that a vector takes at once
  const uint64_t key = static_cast<uint64_t>(*seed);
  const C scale = static_cast<C>(keep_scale);
  int64_t first = (int64_t(blockIdx.x) * kUnroll * kThreads + threadIdx.x) * kVector<T>;
  Vector<T> v[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    int64_t i = first + int64_t(u) * kThreads * kVector<T>;
    v[u] = load_count(x + i, n - i, aligned);
  }
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    int64_t i = first + int64_t(u) * kThreads * kVector<T>;
    if (i >= n) break;
#pragma unroll
    for (int begin = 0; begin < kVector<T>; begin += kWords) {
      Philox block((i + begin) / 4, key);
      int at = kWords == 4 ? 0 : int(i % 4);
#pragma unroll
      for (int e = 0; e < kWords; ++e) {
        T& element = v[u].at[begin + e];  // chosen, not multiplied: what is dropped may be NaN
        element = narrow<T>(word(block, at + e) < drop_below ? C(0) : C(widen(element)) * scale);
      }
    }
    store_count(y + i, v[u], n - i, aligned);
  }
}

}  // namespace

void dropout(const Target& target, DType dtype, const void* x, void* y, int64_t n, double p, const int64_t* seed) {
  dispatch_float(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    launch(target, "dropout", dropout_kernel<T>, grid_of(ceil_div(n, kThreads * kUnroll * kVector<T>)), kThreads, 0,
           static_cast<const T*>(x), static_cast<T*>(y), n, seed, static_cast<uint32_t>(p * 4294967296.0), 1 / (1 - p),
           aligned16(x) && aligned16(y));
  });
}

}  // namespace fastlm::cuda
