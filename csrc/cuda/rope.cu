// Rotary positions (Su et al. 2021, arXiv:2104.09864), both halves of a row in one pass.
#include "rope.h"

#include "common.cuh"

namespace fastlm::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kPieces = 2;  // that a thread works on, all loads first

template <class T> struct RopeArgs {
  const T* x;
  const compute_t<T>*cos, *sin;
  T* y;
  RopeShape shape;
  int64_t rows;
  int rows_of_block, pairs, pieces;  // pieces of a row: vectors of pairs, then vectors of what is copied
  bool aligned;
};

// The tables' elements that go with a vector of T.
template <class T>
__device__ void load_table(compute_t<T> (&out)[kVector<T>], const compute_t<T>* from, int64_t count, bool aligned) {
  using C = compute_t<T>;
#pragma unroll
  for (int part = 0; part < kVector<T> / kVector<C>; ++part) {
    Vector<C> v = load_count(from + part * kVector<C>, count - part * kVector<C>, aligned);
#pragma unroll
    for (int e = 0; e < kVector<C>; ++e) out[part * kVector<C> + e] = v.at[e];
  }
}

template <class T> __global__ void __launch_bounds__(kThreads) rope_kernel(const RopeArgs<T> args) {
  using C = compute_t<T>;
  const RopeShape& shape = args.shape;
  const int64_t first_row = int64_t(blockIdx.x) * args.rows_of_block;
  const int rows = args.rows - first_row < args.rows_of_block ? int(args.rows - first_row) : args.rows_of_block;
  for (int begin = threadIdx.x; begin < rows * args.pieces; begin += kThreads * kPieces) {
    Vector<T> a[kPieces], b[kPieces];
#pragma unroll
    for (int u = 0; u < kPieces; ++u) {
      int number = begin + u * kThreads, piece = number % args.pieces;
      if (number >= rows * args.pieces) break;
      const T* row = args.x + (first_row + number / args.pieces) * shape.dim;
      if (piece < args.pairs) {
        int64_t i = int64_t(piece) * kVector<T>;
        a[u] = load_count(row + i, shape.half - i, args.aligned);
        b[u] = load_count(row + shape.half + i, shape.half - i, args.aligned);
      } else {
        int64_t i = 2 * shape.half + int64_t(piece - args.pairs) * kVector<T>;
        a[u] = load_count(row + i, shape.dim - i, args.aligned);
      }
    }
#pragma unroll
    for (int u = 0; u < kPieces; ++u) {
      int number = begin + u * kThreads, piece = number % args.pieces;
      if (number >= rows * args.pieces) break;
      const int64_t r = first_row + number / args.pieces;
      T* row = args.y + r * shape.dim;
      if (piece < args.pairs) {
        int64_t i = int64_t(piece) * kVector<T>, angle = r / shape.heads % shape.table_rows * shape.half + i;
        C cos[kVector<T>], sin[kVector<T>];
        load_table<T>(cos, args.cos + angle, shape.half - i, args.aligned);
        load_table<T>(sin, args.sin + angle, shape.half - i, args.aligned);
#pragma unroll
        for (int e = 0; e < kVector<T>; ++e) {
          C left = C(widen(a[u].at[e])), right = C(widen(b[u].at[e]));
          a[u].at[e] = narrow<T>(fma(left, cos[e], -(right * sin[e])));
          b[u].at[e] = narrow<T>(fma(right, cos[e], left * sin[e]));
        }
        store_count(row + i, a[u], shape.half - i, args.aligned);
        store_count(row + shape.half + i, b[u], shape.half - i, args.aligned);
      } else {
        int64_t i = 2 * shape.half + int64_t(piece - args.pairs) * kVector<T>;
        store_count(row + i, a[u], shape.dim - i, args.aligned);
      }
    }
  }
}

}  // namespace

void rope(const Target& target, DType dtype, const RopeShape& shape, const void* x, const void* cos, const void* sin, void* y,
          int64_t positions) {
  dispatch_float(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using C = compute_t<T>;
    int64_t pairs = ceil_div(shape.half, kVector<T>), pieces = pairs + ceil_div(shape.dim - 2 * shape.half, kVector<T>);
    if (pieces >= 1 << 30) throw std::invalid_argument("fastlm: rope: a row is too long");
    int64_t rows = positions * shape.heads, rows_of_block = std::max<int64_t>(1, kThreads * kPieces / std::max<int64_t>(pieces, 1));
    bool aligned = aligned16(x) && aligned16(cos) && aligned16(sin) && aligned16(y) && shape.half % kVector<T> == 0 &&
                   shape.dim % kVector<T> == 0;
    RopeArgs<T> args{static_cast<const T*>(x), static_cast<const C*>(cos), static_cast<const C*>(sin), static_cast<T*>(y), shape,
                     rows, int(rows_of_block), int(pairs), int(pieces), aligned};
    launch(target, "rope", rope_kernel<T>, grid_of(ceil_div(rows, rows_of_block)), kThreads, 0, args);
  });
}

}  // namespace fastlm::cuda
