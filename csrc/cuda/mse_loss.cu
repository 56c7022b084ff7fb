// The sum of squared differences, and its gradient: one pass over memory each.
#include "mse_loss.h"

#include "common.cuh"

namespace fastlm::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 2;  // independent 16-byte loads in flight per thread and tensor
// Elements that a block adds up: in float by thread, in double across threads and blocks. It depends on nothing, so neither
// does the result. 384 blocks at (4096, 3072).
constexpr int64_t kChunk = 32768;

template <class T>
__global__ void __launch_bounds__(kThreads)
    mse_loss_fwd_kernel(const T* x, const T* y, compute_t<T>* partial, int64_t n, bool aligned) {
  using C = compute_t<T>;
  int64_t begin = blockIdx.x * kChunk, end = begin + kChunk < n ? begin + kChunk : n;
  C sum[kVector<T>] = {};
  for (int64_t i = begin + int64_t(threadIdx.x) * kVector<T>; i < end; i += kUnroll * kThreads * kVector<T>) {
    Vector<T> a[kUnroll], b[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      int64_t at = i + u * kThreads * kVector<T>;
      a[u] = load_count(x + at, end - at, aligned);
      b[u] = load_count(y + at, end - at, aligned);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
      for (int e = 0; e < kVector<T>; ++e) {
        C d = C(widen(a[u].at[e])) - C(widen(b[u].at[e]));
        sum[e] += d * d;
      }
    }
  }
  double total = 0;
#pragma unroll
  for (int e = 0; e < kVector<T>; ++e) total += sum[e];
  total = block_sum<kThreads>(total);
  if (threadIdx.x == 0) partial[blockIdx.x] = static_cast<C>(total);
}

template <class C>
__global__ void __launch_bounds__(kThreads) mse_loss_sum_kernel(const C* partial, C* sum, int64_t chunks) {
  double total = 0;
  for (int64_t i = threadIdx.x; i < chunks; i += kThreads) total += partial[i];
  total = block_sum<kThreads>(total);
  if (threadIdx.x == 0) *sum = static_cast<C>(total);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    mse_loss_bwd_kernel(const compute_t<T>* g, const T* x, const T* y, T* dx, int64_t n, bool aligned) {
  using C = compute_t<T>;
  const C scale = 2 * *g;
  int64_t first = (int64_t(blockIdx.x) * kUnroll * kThreads + threadIdx.x) * kVector<T>;
  Vector<T> a[kUnroll], b[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    int64_t i = first + int64_t(u) * kThreads * kVector<T>;
    a[u] = load_count(x + i, n - i, aligned);
    b[u] = load_count(y + i, n - i, aligned);
  }
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    int64_t i = first + int64_t(u) * kThreads * kVector<T>;
#pragma unroll
    for (int e = 0; e < kVector<T>; ++e) {
      a[u].at[e] = narrow<T>(scale * (C(widen(a[u].at[e])) - C(widen(b[u].at[e]))));
    }
    store_count(dx + i, a[u], n - i, aligned);
  }
}

}  // namespace

int64_t mse_loss_chunks(int64_t n) { return ceil_div(n, kChunk); }

void mse_loss_forward(const Target& target, DType dtype, const void* x, const void* y, void* sum, void* partial, int64_t n) {
  dispatch_float(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using C = compute_t<T>;
    launch(target, "mse_loss", mse_loss_fwd_kernel<T>, grid_of(mse_loss_chunks(n)), kThreads, 0, static_cast<const T*>(x),
           static_cast<const T*>(y), static_cast<C*>(partial), n, aligned16(x) && aligned16(y));
    launch(target, "mse_loss", mse_loss_sum_kernel<C>, dim3(1), kThreads, 0, static_cast<const C*>(partial),
           static_cast<C*>(sum), mse_loss_chunks(n));
  });
}

void mse_loss_backward(const Target& target, DType dtype, const void* g, const void* x, const void* y, void* dx, int64_t n) {
  dispatch_float(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    launch(target, "mse_loss_backward", mse_loss_bwd_kernel<T>, grid_of(ceil_div(n, kThreads * kUnroll * kVector<T>)),
           kThreads, 0, static_cast<const compute_t<T>*>(g), static_cast<const T*>(x), static_cast<const T*>(y),
           static_cast<T*>(dx), n, aligned16(x) && aligned16(y) && aligned16(dx));
  });
}

}  // namespace fastlm::cuda
