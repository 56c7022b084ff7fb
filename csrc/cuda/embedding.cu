// The rows of a table that indices name, and its gradient: sums over the places of each index, which were sorted before. No
// atomics: the places are cut into parts of a fixed size, and sums that go on from one part to the next are added up after.
#include "embedding.h"

#include "common.cuh"

namespace fastlm::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 4;  // 16-byte vectors under way per thread
// Places of a part, and its threads, each with a vector of columns. Shorter parts are more blocks, but up to two sums of each
// are written and read once more.
constexpr int kPlaces = 32, kLanes = 128;

// --- forward: a warp copies a row -------------------------------------------------------------------------------------
template <class T>
__global__ void __launch_bounds__(kThreads)
    embedding_fwd_kernel(const T* weight, const int64_t* index, T* y, int64_t count, int64_t rows, int64_t cols, bool aligned) {
  int64_t place = int64_t(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (place >= count) return;
  int64_t row = index[place];
  const bool known = row >= 0 && row < rows;
  const T* from = weight + (known ? row * cols : 0);
  T* to = y + place * cols;
  constexpr int64_t kStep = kWarp * kVector<T>;
  for (int64_t first = threadIdx.x % kWarp * kVector<T>; first < cols; first += kUnroll * kStep) {
    Vector<T> v[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      int64_t col = first + u * kStep;
      v[u] = load_count(from + col, known ? cols - col : 0, aligned);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      int64_t col = first + u * kStep;
      if (!known) {
#pragma unroll
        for (int e = 0; e < kVector<T>; ++e) v[u].at[e] = narrow<T>(NAN);
      }
      store_count(to + col, v[u], cols - col, aligned);
    }
  }
}

// --- backward ---------------------------------------------------------------------------------------------------------
template <class T> struct Args {
  const T* dy;
  const int64_t *index, *order;  // sorted, and the rows of dy
  T* dweight;
  compute_t<T>* partial;  // two rows of each part: of the sum that came from the part before, and of one that goes on after it
  int64_t count, rows, cols, padding;
  int64_t column_blocks;
  bool aligned;

  __device__ bool counts(int64_t v) const { return v >= 0 && v < rows && v != padding; }
  // Whether the places before and at p have the same index.
  __device__ bool goes_on(int64_t p) const { return p > 0 && p < count && index[p - 1] == index[p]; }
};

// Block b works on columns of block b % column_blocks and on the part of places b / column_blocks.
template <class T> struct Place {
  int64_t part, begin, end, col, width;
  __device__ explicit Place(const Args<T>& args) {
    part = blockIdx.x / args.column_blocks;
    begin = part * kPlaces;
    end = begin + kPlaces < args.count ? begin + kPlaces : args.count;
    col = (blockIdx.x % args.column_blocks * kLanes + threadIdx.x) * kVector<T>;
    width = args.cols - col;
  }
};

template <class T> __device__ void store_narrow(T* to, const compute_t<T> (&sum)[kVector<T>], int64_t count, bool aligned) {
  Vector<T> v;
#pragma unroll
  for (int e = 0; e < kVector<T>; ++e) v.at[e] = narrow<T>(sum[e]);
  store_count(to, v, count, aligned);
}

template <class T> __global__ void __launch_bounds__(kLanes) embedding_bwd_kernel(const Args<T> args) {
  using C = compute_t<T>;
  __shared__ int64_t index[kPlaces], order[kPlaces];  // -1 past the end
  __shared__ bool goes_on[kPlaces + 1];
  const Place<T> at(args);
  if (int i = threadIdx.x; i <= kPlaces) {
    goes_on[i] = args.goes_on(at.begin + i);
    if (i < kPlaces) {
      const bool here = at.begin + i < at.end;
      index[i] = here ? args.index[at.begin + i] : -1;
      order[i] = here ? args.order[at.begin + i] : -1;
    }
  }
  __syncthreads();
  if (at.width <= 0) return;
  C sum[kVector<T>] = {};
  bool from_before = goes_on[0];
  // Of places that all have the index v; whether the next one has it too.
  auto finish = [&](int64_t v, bool more) {
    if (args.counts(v)) {
      if (from_before || more) {
        C* to = args.partial + (2 * at.part + (from_before ? 0 : 1)) * args.cols + at.col;
#pragma unroll
        for (int e = 0; e < kVector<T>; ++e) {
          if (e < at.width) to[e] = sum[e];
        }
      } else {
        store_narrow<T>(args.dweight + v * args.cols + at.col, sum, at.width, args.aligned);
      }
    }
#pragma unroll
    for (int e = 0; e < kVector<T>; ++e) sum[e] = 0;
    from_before = false;
  };
  const int places = static_cast<int>(at.end - at.begin);
  for (int i = 0; i < places; i += kUnroll) {
    Vector<T> d[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const bool counts = args.counts(index[i + u]);
      d[u] = load_count(args.dy + (counts ? order[i + u] * args.cols + at.col : 0), counts ? at.width : 0, args.aligned);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (i + u >= places) break;
#pragma unroll
      for (int e = 0; e < kVector<T>; ++e) sum[e] += C(widen(d[u].at[e]));
      const bool last = i + u + 1 == places;
      if (last || !goes_on[i + u + 1]) finish(index[i + u], goes_on[i + u + 1]);
    }
  }
}

// Adds up the sums that begin in a part and go on after it.
template <class T> __global__ void __launch_bounds__(kLanes) embedding_bwd_join_kernel(const Args<T> args) {
  using C = compute_t<T>;
  const Place<T> at(args);
  const int64_t v = args.index[at.end - 1];
  const bool begins_before = args.index[at.begin] == v && args.goes_on(at.begin);
  if (at.width <= 0 || begins_before || !args.goes_on(at.end) || !args.counts(v)) return;
  double sum[kVector<T>] = {};
  auto add = [&](int64_t row) {
    const C* from = args.partial + row * args.cols + at.col;
#pragma unroll
    for (int e = 0; e < kVector<T>; ++e) sum[e] += e < at.width ? from[e] : C(0);
  };
  add(2 * at.part + 1);
  for (int64_t part = at.part + 1; part * kPlaces < args.count && args.index[part * kPlaces] == v; ++part) add(2 * part);
  C total[kVector<T>];
#pragma unroll
  for (int e = 0; e < kVector<T>; ++e) total[e] = static_cast<C>(sum[e]);
  store_narrow<T>(args.dweight + v * args.cols + at.col, total, at.width, args.aligned);
}

}  // namespace

int64_t embedding_partial_rows(int64_t count) { return 2 * ceil_div(count, kPlaces); }

void embedding_forward(const Target& target, DType dtype, const void* weight, const int64_t* index, void* y, int64_t count,
                       int64_t rows, int64_t cols) {
  dispatch_float(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    launch(target, "embedding", embedding_fwd_kernel<T>, grid_of(cols > 0 ? ceil_div(count, kThreads / kWarp) : 0), kThreads, 0,
           static_cast<const T*>(weight), index, static_cast<T*>(y), count, rows, cols,
           aligned16(weight) && aligned16(y) && cols % kVector<T> == 0);
  });
}

void embedding_backward(const Target& target, DType dtype, const void* dy, const int64_t* index, const int64_t* order, void* dweight,
                        void* partial, int64_t count, int64_t rows, int64_t cols, int64_t padding) {
  dispatch_float(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const int64_t column_blocks = ceil_div(cols, kLanes * kVector<T>);
    const Args<T> args{static_cast<const T*>(dy), index, order, static_cast<T*>(dweight), static_cast<compute_t<T>*>(partial),
                       count, rows, cols, padding, column_blocks, aligned16(dy) && aligned16(dweight) && cols % kVector<T> == 0};
    const dim3 grid = grid_of(column_blocks * ceil_div(count, kPlaces));
    launch(target, "embedding_backward", embedding_bwd_kernel<T>, grid, kLanes, 0, args);
    launch(target, "embedding_backward", embedding_bwd_join_kernel<T>, grid, kLanes, 0, args);
  });
}

}  // namespace fastlm::cuda
