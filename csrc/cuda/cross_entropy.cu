// Cross-entropy over rows of logits: forward reads them once, with an online softmax (Milakov and Gimelshein 2018,
// arXiv:1805.02867), backward reads them again and writes their gradient. A row is for as many threads as its
// vectors keep busy.
#include "cross_entropy.h"

#include "common.cuh"

namespace fastlm::cuda {
namespace {

constexpr int kUnroll = 4;  // 16-byte vectors under way per thread
// Threads of a row, by its vectors: a warp, four, or eight. Short rows share a block.
constexpr int kFew = 32, kSome = 128, kMany = 256;
template <int kGroup> constexpr int kThreads = kGroup == kFew ? 256 : kGroup;
// Blocks that a multiprocessor holds at once, which leaves a thread 80 registers; tanh and float64 take more.
template <class T, int kGroup, bool kCapped> constexpr int kBlocks = (sizeof(T) == 8 || kCapped ? 512 : 768) / kThreads<kGroup>;

// As exact as the elements are: of 16 bits, the instruction that there is.
template <class T> __device__ compute_t<T> exp_of(compute_t<T> x) {
  if constexpr (sizeof(T) == 2) return exp2_approx(x * 1.4426950408889634f);
  return exp(x);
}

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

// A row's elements by vectors, of which thread `lane` of kGroup has its part, kUnroll at a time. Rows of an odd number of classes
// begin anywhere, so vectors begin at the row's first multiple of 16 bytes, and what comes before is a vector of its own.
template <class T, int kGroup> struct Vectors {
  const T* row;
  int64_t classes, head;
  bool aligned;
  int lane;

  __device__ Vectors(const T* row, int64_t classes, bool aligned) : row(row), classes(classes), head(0), aligned(aligned) {
    lane = threadIdx.x % kGroup;
    if (aligned) head = (16 - reinterpret_cast<uintptr_t>(row) % 16) % 16 / sizeof(T);
    if (head > classes) head = classes;
  }
  // run(first columns, counts, whether 16 bytes may be accessed at once) for each batch, by `load` or as they are.
  template <class Run> __device__ void each_batch(const Run& run) const {
    int64_t cols[kUnroll] = {}, counts[kUnroll] = {head};
    if (lane == 0 && head > 0) run(cols, counts, false);
    constexpr int64_t kStep = int64_t(kGroup) * kVector<T>;
    for (int64_t first = head + int64_t(lane) * kVector<T>; first < classes; first += kUnroll * kStep) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        cols[u] = first + u * kStep;
        counts[u] = cols[u] < classes ? classes - cols[u] : 0;
      }
      run(cols, counts, aligned);
    }
  }
  __device__ void load(Vector<T> (&v)[kUnroll], const int64_t (&cols)[kUnroll], const int64_t (&counts)[kUnroll], bool whole) const {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) v[u] = load_count(row + cols[u], counts[u], whole);
  }
};

// Over the group, for all of it: the larger of two, or the sum. All threads of the group take part.
template <int kGroup, bool kMax, class C> __device__ C reduce(C x) {
  auto join = [](C a, C b) { return kMax ? (a > b ? a : b) : a + b; };
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) x = join(x, shuffle_xor(x, mask));
  if constexpr (kGroup > kWarp) {  // the block, then
    __shared__ C of_warps[kGroup / kWarp];
    __syncthreads();  // what was here before has been read
    if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = x;
    __syncthreads();
    x = of_warps[0];
    for (int w = 1; w < kGroup / kWarp; ++w) x = join(x, of_warps[w]);
  }
  return x;
}

template <class T, int kGroup, bool kCapped>
__global__ void __launch_bounds__(kThreads<kGroup>, kBlocks<T, kGroup, kCapped>) cross_entropy_fwd_kernel(const Args<T> args) {
  using C = compute_t<T>;
  int64_t r = int64_t(blockIdx.x) * (kThreads<kGroup> / kGroup) + threadIdx.x / kGroup;
  if (r >= args.rows) return;  // a whole group
  const CrossEntropyShape& shape = args.shape;
  const bool first = threadIdx.x % kGroup == 0, smooth = shape.smoothing > 0;
  const int64_t target = args.target[r];
  if (target == shape.ignored) {
    if (first) args.loss[r] = args.lse[r] = 0;
    return;
  }
  const Vectors<T, kGroup> row(args.x + r * shape.classes, shape.classes, true);
  const C cap = C(shape.softcap), inverse_cap = C(1) / cap;
  auto logit = [&](C x) { return kCapped ? cap * tanh(x * inverse_cap) : x; };
  C top = -INFINITY, total = 0, all = 0;  // total = sum of exp(z - top)
  row.each_batch([&](const int64_t (&cols)[kUnroll], const int64_t (&counts)[kUnroll], bool whole) {
    Vector<T> v[kUnroll];
    row.load(v, cols, counts, whole);
    C new_top = top;
    auto z = [&](int u, int e) { return e < counts[u] ? logit(C(widen(v[u].at[e]))) : C(-INFINITY); };
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
      for (int e = 0; e < kVector<T>; ++e) {
        C value = z(u, e);
        new_top = value > new_top ? value : new_top;  // a NaN gets lost here, and comes back with the sum
        if (smooth && e < counts[u]) all += value;
      }
    }
    const C base = new_top == -INFINITY ? C(0) : new_top;  // exp(-inf - -inf) would be NaN
    total *= exp_of<T>(top - base);
    top = new_top;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
      for (int e = 0; e < kVector<T>; ++e) total += exp_of<T>(z(u, e) - base);
    }
  });
  C of_all = reduce<kGroup, true>(top), base = of_all == -INFINITY ? C(0) : of_all;
  total = reduce<kGroup, false>(total * exp_of<T>(top - base));
  if (smooth) all = reduce<kGroup, false>(all);
  if (!first) return;
  C rest = log(total), value = NAN;
  if (target >= 0 && target < shape.classes) {
    value = (of_all - logit(C(widen(row.row[target])))) + rest;
    if (smooth) {
      C smoothing = C(shape.smoothing);
      value = (1 - smoothing) * value + smoothing * ((of_all - all / C(shape.classes)) + rest);
    }
  }
  args.loss[r] = value;
  args.lse[r] = of_all + rest;
}

template <class T, int kGroup, bool kCapped>
__global__ void __launch_bounds__(kThreads<kGroup>, kBlocks<T, kGroup, kCapped>) cross_entropy_bwd_kernel(const Args<T> args) {
  using C = compute_t<T>;
  int64_t r = int64_t(blockIdx.x) * (kThreads<kGroup> / kGroup) + threadIdx.x / kGroup;
  if (r >= args.rows) return;
  const CrossEntropyShape& shape = args.shape;
  const int64_t target = args.target[r];
  const bool counts_at_all = target != shape.ignored, known = target >= 0 && target < shape.classes;
  const T* x = args.x + r * shape.classes;
  T* out = args.dx + r * shape.classes;
  const bool alike = (reinterpret_cast<uintptr_t>(x) ^ reinterpret_cast<uintptr_t>(out)) % 16 == 0;
  const Vectors<T, kGroup> row(x, shape.classes, alike);
  const C cap = C(shape.softcap), inverse_cap = C(1) / cap, base = args.lse[r], g = known ? args.g[r] : C(NAN);
  const C of_lse = args.dlse != nullptr ? args.dlse[r] : C(0);
  const C even = g * C(shape.smoothing) / C(shape.classes), of_target = g * (1 - C(shape.smoothing));
  row.each_batch([&](const int64_t (&cols)[kUnroll], const int64_t (&counts)[kUnroll], bool whole) {
    Vector<T> v[kUnroll];
    if (counts_at_all) row.load(v, cols, counts, whole);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
      for (int e = 0; e < kVector<T>; ++e) {
        if (!counts_at_all) {
          v[u].at[e] = narrow<T>(0.0f);
          continue;
        }
        C z = C(widen(v[u].at[e])), t = kCapped ? tanh(z * inverse_cap) : C(0);
        if (kCapped) z = cap * t;
        C p = exp_of<T>(z - base);
        // Of a class: p less its share of the target, times g, and p times dlse.
        C d = fma(p, of_lse, fma(p, g, -(even + (cols[u] + e == target ? of_target : C(0)))));
        v[u].at[e] = narrow<T>(kCapped ? d * (1 - t * t) : d);
      }
      store_count(out + cols[u], v[u], counts[u], whole);
    }
  });
}

// run(the threads of a row, whether logits are capped) as types, and the grid.
template <class T, class Run> void dispatch_row(int64_t rows, const CrossEntropyShape& shape, const Run& run) {
  auto with = [&](auto group) {
    constexpr int kGroup = decltype(group)::value;
    dim3 grid = grid_of(ceil_div(rows, kThreads<kGroup> / kGroup));
    shape.softcap > 0 ? run(group, std::true_type{}, grid) : run(group, std::false_type{}, grid);
  };
  int64_t vectors = ceil_div(shape.classes, kVector<T>);
  if (vectors <= kFew * kUnroll) return with(std::integral_constant<int, kFew>{});
  if (vectors <= kSome * kUnroll) return with(std::integral_constant<int, kSome>{});
  with(std::integral_constant<int, kMany>{});
}

}  // namespace

void cross_entropy_forward(const Target& device, DType dtype, const void* x, const int64_t* target, void* loss, void* lse,
                           int64_t rows, const CrossEntropyShape& shape) {
  dispatch_float(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using C = compute_t<T>;
    Args<T> args{static_cast<const T*>(x), target, static_cast<C*>(loss), static_cast<C*>(lse), nullptr, nullptr, nullptr, rows,
                 shape};
    dispatch_row<T>(rows, shape, [&](auto group, auto capped, dim3 grid) {
      constexpr int kGroup = decltype(group)::value;
      launch(device, "cross_entropy", cross_entropy_fwd_kernel<T, kGroup, decltype(capped)::value>, grid, kThreads<kGroup>, 0, args);
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
    dispatch_row<T>(rows, shape, [&](auto group, auto capped, dim3 grid) {
      constexpr int kGroup = decltype(group)::value;
      launch(device, "cross_entropy_backward", cross_entropy_bwd_kernel<T, kGroup, decltype(capped)::value>, grid, kThreads<kGroup>, 0,
             args);
    });
  });
}

}  // namespace fastlm::cuda
