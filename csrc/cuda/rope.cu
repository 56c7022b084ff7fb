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

template <class T> __global__ void __launch_bounds__(kThreads) rope_kernel(const RopeArgs<T> args) {
  using C = compute_t<T>;
  const RopeShape& shape = args.shape;
  const int64_t first_row = int64_t(blockIdx.x) * args.rows_of_block, position = first_row / shape.heads;
  const int rows = args.rows - first_row < args.rows_of_block ? int(args.rows - first_row) : args.rows_of_block;
  // From here on in 32 bits: the head of the first row, and its position's place in the tables.
  const uint32_t heads = uint32_t(shape.heads), head = uint32_t(first_row - position * shape.heads),
                 table_rows = uint32_t(shape.table_rows), place = uint32_t(position % shape.table_rows);
  for (int begin = threadIdx.x; begin < rows * args.pieces; begin += kThreads * kPieces) {
    Vector<T> a[kPieces], b[kPieces];
    C cos[kPieces][kVector<T>], sin[kPieces][kVector<T>];
#pragma unroll
    for (int u = 0; u < kPieces; ++u) {
      int number = begin + u * kThreads, local = number / args.pieces, piece = number - local * args.pieces;
      if (number >= rows * args.pieces) break;
      const T* row = args.x + (first_row + local) * shape.dim;
      if (piece < args.pairs) {
        int64_t i = int64_t(piece) * kVector<T>, count = shape.half - i;
        int64_t angle = int64_t((place + (head + local) / heads) % table_rows) * shape.half + i;
        a[u] = load_count(row + i, count, args.aligned);
        b[u] = load_count(row + shape.half + i, count, args.aligned);
        load_wide<T>(cos[u], args.cos + angle, count, args.aligned);
        load_wide<T>(sin[u], args.sin + angle, count, args.aligned);
      } else {
        int64_t i = 2 * shape.half + int64_t(piece - args.pairs) * kVector<T>;
        a[u] = load_count(row + i, shape.dim - i, args.aligned);
      }
    }
#pragma unroll
    for (int u = 0; u < kPieces; ++u) {
      int number = begin + u * kThreads, local = number / args.pieces, piece = number - local * args.pieces;
      if (number >= rows * args.pieces) break;
      T* row = args.y + (first_row + local) * shape.dim;
      if (piece < args.pairs) {
        int64_t i = int64_t(piece) * kVector<T>, count = shape.half - i;
#pragma unroll
        for (int e = 0; e < kVector<T>; ++e) {
          C left = C(widen(a[u].at[e])), right = C(widen(b[u].at[e]));
          a[u].at[e] = narrow<T>(fma(left, cos[u][e], -(right * sin[u][e])));
          b[u].at[e] = narrow<T>(fma(right, cos[u][e], left * sin[u][e]));
        }
        store_count(row + i, a[u], count, args.aligned);
        store_count(row + shape.half + i, b[u], count, args.aligned);
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
    if (std::max({pieces, shape.heads, shape.table_rows}) >= 1 << 30) {
      throw std::invalid_argument("fastlm: rope: heads, positions and head dims must be below 2^30");
    }
    int64_t rows = positions * shape.heads, rows_of_block = std::max<int64_t>(1, kThreads * kPieces / std::max<int64_t>(pieces, 1));
    bool aligned = aligned16(x) && aligned16(cos) && aligned16(sin) && aligned16(y) && shape.half % kVector<T> == 0 &&
                   shape.dim % kVector<T> == 0;
    RopeArgs<T> args{static_cast<const T*>(x), static_cast<const C*>(cos), static_cast<const C*>(sin), static_cast<T*>(y), shape,
                     rows, int(rows_of_block), int(pairs), int(pieces), aligned};
    launch(target, "rope", rope_kernel<T>, grid_of(ceil_div(rows, rows_of_block)), kThreads, 0, args);
  });
}

}  // namespace fastlm::cuda
