// Cross-entropy over rows of logits: forward reads them once, with an online softmax (Milakov and Gimelshein 2018,
// arXiv:1805.02867), backward reads them again and writes their gradient. A row is for a warp where it is short, else for a block.
#include "cross_entropy.h"

#include "common.cuh"

namespace fastlm::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kUnroll = 4;  // 16-byte vectors under way per thread
constexpr int64_t kShort = 1024;  // classes of a row that a warp takes

__device__ inline float exp_of(float x) { return exp2_approx(x * 1.4426950408889634f); }
__device__ inline double exp_of(double x) { return exp(x); }

template <class T> struct Args {
  using C = compute_t<T>;
  const T* x;
  const int64_t* target;
  C *loss, *lse;
  const C *g, *dlse;
  T* dx;
  int64_t rows;
  CrossEntropyShape shape;
};

template <class T> __device__ compute_t<T> logit(compute_t<T> x, compute_t<T> cap) {
  return cap > 0 ? cap * tanh(x / cap) : x;
}

// How many elements of a row come before its first multiple of 16 bytes, where vectors begin: rows of an odd number of classes
// begin anywhere.
template <class T> __device__ int64_t before_vectors(const T* row, int64_t classes) {
  int64_t head = (16 - reinterpret_cast<uintptr_t>(row) % 16) % 16 / sizeof(T);
  return head < classes ? head : classes;
}

// run(first column, elements, at a multiple of 16 bytes, the vector) on each vector of a row, of which `lane` of kGroup threads
// takes its part; kUnroll loads come before the first is used.
template <int kGroup, class T, class Run>
__device__ void each_vector(const T* row, int64_t classes, bool vectors, int lane, const Run& run) {
  int64_t head = vectors ? before_vectors(row, classes) : 0;
  if (lane == 0 && head > 0) run(0, head, false, load_count(row, head, false));
  for (int64_t first = head + int64_t(lane) * kVector<T>; first < classes; first += int64_t(kUnroll) * kGroup * kVector<T>) {
    Vector<T> loaded[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      int64_t col = first + int64_t(u) * kGroup * kVector<T>;
      if (col < classes) loaded[u] = load_count(row + col, classes - col, vectors);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      int64_t col = first + int64_t(u) * kGroup * kVector<T>;
      if (col < classes) run(col, classes - col, vectors, loaded[u]);
    }
  }
}

// Over the group, for all of it: the larger of two, or the sum. All threads of a block take part.
template <int kGroup, bool kMax, class C> __device__ C reduce(C x) {
  auto join = [](C a, C b) { return kMax ? (a > b ? a : b) : a + b; };
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) x = join(x, shuffle_xor(x, mask));
  if constexpr (kGroup > kWarp) {
    __shared__ C of_warps[kGroup / kWarp];
    __syncthreads();  // what was here before has been read
    if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = x;
    __syncthreads();
    x = of_warps[0];
    for (int w = 1; w < kGroup / kWarp; ++w) x = join(x, of_warps[w]);
  }
  return x;
}

template <class T, int kGroup> __global__ void __launch_bounds__(kThreads, 1) cross_entropy_fwd_kernel(const Args<T> args) {
  using C = compute_t<T>;
  int64_t r = int64_t(blockIdx.x) * (kThreads / kGroup) + threadIdx.x / kGroup;
  if (r >= args.rows) return;  // a whole group
  const int lane = threadIdx.x % kGroup;
  const CrossEntropyShape& shape = args.shape;
  const int64_t target = args.target[r];
  if (target == shape.ignored) {
    if (lane == 0) args.loss[r] = args.lse[r] = 0;
    return;
  }
  const T* row = args.x + r * shape.classes;
  const C cap = C(shape.softcap);
  C top = -INFINITY, total = 0, all = 0;  // total = sum of exp(z - top)
  each_vector<kGroup>(row, shape.classes, true, lane, [&](int64_t, int64_t count, bool, const Vector<T>& v) {
    C z[kVector<T>], new_top = top;
#pragma unroll
    for (int e = 0; e < kVector<T>; ++e) {
      z[e] = e < count ? logit<T>(C(widen(v.at[e])), cap) : C(-INFINITY);
      new_top = z[e] > new_top ? z[e] : new_top;  // a NaN gets lost here, and comes back with the sum
      if (e < count) all += z[e];
    }
    const C base = new_top == -INFINITY ? C(0) : new_top;  // exp(-inf - -inf) would be NaN
    total *= exp_of(top - base);
    top = new_top;
#pragma unroll
    for (int e = 0; e < kVector<T>; ++e) total += exp_of(z[e] - base);
  });
  C of_all = reduce<kGroup, true>(top), base = of_all == -INFINITY ? C(0) : of_all;
  total = reduce<kGroup, false>(total * exp_of(top - base));
  if (shape.smoothing > 0) all = reduce<kGroup, false>(all);
  if (lane != 0) return;
  C rest = log(total), value = NAN;
  if (target >= 0 && target < shape.classes) {
    value = (of_all - logit<T>(C(widen(row[target])), cap)) + rest;
    if (shape.smoothing > 0) {
      C smoothing = C(shape.smoothing);
      value = (1 - smoothing) * value + smoothing * ((of_all - all / C(shape.classes)) + rest);
    }
  }
  args.loss[r] = value;
  args.lse[r] = of_all + rest;
}

template <class T, int kGroup> __global__ void __launch_bounds__(kThreads) cross_entropy_bwd_kernel(const Args<T> args) {
  using C = compute_t<T>;
  int64_t r = int64_t(blockIdx.x) * (kThreads / kGroup) + threadIdx.x / kGroup;
  if (r >= args.rows) return;
  const CrossEntropyShape& shape = args.shape;
  const int64_t target = args.target[r];
  const bool counts = target != shape.ignored, known = target >= 0 && target < shape.classes;
  const T* row = args.x + r * shape.classes;
  T* out = args.dx + r * shape.classes;
  const C cap = C(shape.softcap), base = args.lse[r], g = known ? args.g[r] : C(NAN);
  const C of_lse = args.dlse != nullptr ? args.dlse[r] : C(0);
  const C even = g * C(shape.smoothing) / C(shape.classes), of_target = g * (1 - C(shape.smoothing));
  const bool vectors = (reinterpret_cast<uintptr_t>(row) ^ reinterpret_cast<uintptr_t>(out)) % 16 == 0;
  each_vector<kGroup>(row, shape.classes, vectors, threadIdx.x % kGroup, [&](int64_t col, int64_t count, bool aligned, Vector<T> v) {
#pragma unroll
    for (int e = 0; e < kVector<T>; ++e) {
      C z = logit<T>(C(widen(v.at[e])), cap), p = exp_of(z - base);
      // Of a class: p less its share of the target, times g, and p times dlse.
      C d = fma(p, of_lse, fma(p, g, -(even + (col + e == target ? of_target : C(0)))));
      if (cap > 0) d *= 1 - (z / cap) * (z / cap);
      v.at[e] = narrow<T>(counts ? d : C(0));
    }
    store_count(out + col, v, count, aligned);
  });
}

template <class T, class Run> void dispatch_group(int64_t rows, int64_t classes, const Run& run) {
  if (classes <= kShort) {
    run(std::integral_constant<int, kWarp>{}, grid_of(ceil_div(rows, kThreads / kWarp)));
  } else {
    run(std::integral_constant<int, kThreads>{}, grid_of(rows));
  }
}

}  // namespace

void cross_entropy_forward(const Target& device, DType dtype, const void* x, const int64_t* target, void* loss, void* lse,
                           int64_t rows, const CrossEntropyShape& shape) {
  dispatch_float(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using C = compute_t<T>;
    Args<T> args{static_cast<const T*>(x), target, static_cast<C*>(loss), static_cast<C*>(lse), nullptr, nullptr, nullptr, rows,
                 shape};
    dispatch_group<T>(rows, shape.classes, [&](auto group, dim3 grid) {
      launch(device, "cross_entropy", cross_entropy_fwd_kernel<T, decltype(group)::value>, grid, kThreads, 0, args);
    });
  });
}

void cross_entropy_backward(const Target& device, DType dtype, const void* g, const void* dlse, const void* x,
                            const int64_t* target, const void* lse, void* dx, int64_t rows, const CrossEntropyShape& shape) {
  dispatch_float(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using C = compute_t<T>;
    Args<T> args{static_cast<const T*>(x), target, nullptr, const_cast<C*>(static_cast<const C*>(lse)), static_cast<const C*>(g),
                 static_cast<const C*>(dlse), static_cast<T*>(dx), rows, shape};
    dispatch_group<T>(rows, shape.classes, [&](auto group, dim3 grid) {
      launch(device, "cross_entropy_backward", cross_entropy_bwd_kernel<T, decltype(group)::value>, grid, kThreads, 0, args);
    });
  });
}

}  // namespace fastlm::cuda
