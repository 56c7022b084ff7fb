// Tiles and products of attention in fp16 and bf16 on tensor cores (sm_80 and later), in the manner of FlashAttention-2
// (Dao 2023, https://arxiv.org/abs/2307.08691): tiles in shared memory, online softmax, scores never in device memory.
//
// A block has 4 warps and owns 64 rows of the output, a warp 16. Products are mma.m16n8k16 with fp32 accumulators, fed by
// ldmatrix from swizzled tiles that cp.async fills while the previous tile is used. P goes from the accumulators of one
// product straight into the operand of the next. Head dims are padded with zeros in shared memory to 64, 96, 128, 192 or
// 256.
#pragma once

#include "attention.cuh"

namespace fastlm::cuda::attention {
namespace {

constexpr int kThreads = 128;
constexpr int kRows = 64;  // of a block
constexpr int kWarpRows = 16;

// --- tiles ------------------------------------------------------------------------------------------------------------
// Starts filling a tile of kTileRows rows, padded to kD columns, with rows `first` on of a matrix, of which row r begins at
// data + offset_of(r); zeros past its edges, where nothing is read.
template <class T, int kTileRows, int kD, class OffsetOf>
__device__ void load_rows(T* tile, const T* data, const OffsetOf& offset_of, int first, int rows, int width, bool aligned) {
  constexpr int kChunks = kD / 8;
  auto load = [&](int i, bool whole) {
    int row = i / kChunks, chunk = i % kChunks;
    bool inside = first + row < rows && 8 * chunk < width;
    T* to = tile + tile_offset(row, chunk, kChunks);
    const T* from = inside ? data + offset_of(first + row) + 8 * chunk : data;
    if (whole) {
      copy_async<16>(to, from, inside);
    } else {
      *reinterpret_cast<Vector<T>*>(to) = load_count(from, inside ? width - 8 * chunk : 0, false);
    }
  };
  if (aligned) {
#pragma unroll 4
    for (int i = threadIdx.x; i < kTileRows * kChunks; i += kThreads) load(i, true);
  } else {
#pragma unroll 1
    for (int i = threadIdx.x; i < kTileRows * kChunks; i += kThreads) load(i, false);
  }
}

template <class T, int kTileRows, int kD>
__device__ void load_tile(T* tile, const T* matrix, int64_t stride, int first, int rows, int width, bool aligned) {
  load_rows<T, kTileRows, kD>(tile, matrix, [&](int row) { return row * stride; }, first, rows, width, aligned);
}

// Whether this thread's share of a tile holds an inf or a NaN.
template <class T, int kTileRows, int kD> __device__ bool has_nonfinite(const T* tile) {
  constexpr uint32_t kExponent = std::is_same_v<T, f16> ? 0x7c00u : 0x7f80u;
  struct alignas(16) Words { uint32_t at[4]; };
  bool found = false;
#pragma unroll 2
  for (int i = threadIdx.x; i < kTileRows * kD / 8; i += kThreads) {
    Words words = reinterpret_cast<const Words*>(tile)[i];
#pragma unroll
    for (uint32_t pair : words.at) {
      found |= (pair & kExponent) == kExponent || (pair >> 16 & kExponent) == kExponent;
    }
  }
  return found;
}

// Writes the warp's 16 rows of accumulators, times a factor per row, to rows `first` on of a matrix. They pass through
// `tile`, of which this warp alone uses its own 16 rows, to leave in 16-byte pieces.
template <class T, int kD, int kOut>
__device__ void store_rows(T* tile, const float (&acc)[kOut / 8][4], float factor0, float factor1, T* matrix,
                           int64_t stride, int first, int rows, int width, bool aligned) {
  constexpr int kChunks = kD / 8;
  int lane = threadIdx.x % kWarp, warp_row = threadIdx.x / kWarp * kWarpRows;
  sync_warp();
#pragma unroll
  for (int n = 0; n < kOut / 8; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float factor = half ? factor1 : factor0;
      T* to = tile + tile_offset(warp_row + acc_row(lane, 2 * half), n, kChunks) + acc_col(lane, 0);
      *reinterpret_cast<uint32_t*>(to) = pack<T>(acc[n][2 * half] * factor, acc[n][2 * half + 1] * factor);
    }
  }
  sync_warp();
#pragma unroll 2
  for (int i = lane; i < kWarpRows * (kOut / 8); i += kWarp) {
    int row = warp_row + i / (kOut / 8), chunk = i % (kOut / 8);
    if (first + row >= rows || 8 * chunk >= width) continue;
    Vector<T> v = *reinterpret_cast<const Vector<T>*>(tile + tile_offset(row, chunk, kChunks));
    store_count(matrix + (first + row) * stride + 8 * chunk, v, width - 8 * chunk, aligned);
  }
}

// --- products ---------------------------------------------------------------------------------------------------------
// Columns 16 k ... 16 k + 15 of the warp's 16 rows of a tile, as operand A.
template <class T, int kD> __device__ void load_a(uint32_t (&a)[4], const T* tile, int k) {
  LaneAddress at = a_address(threadIdx.x % kWarp);
  load_matrices(a, tile + tile_offset(threadIdx.x / kWarp * kWarpRows + at.row, 2 * k + at.chunk, kD / 8));
}

// acc (16 x kCols) = x (16 x kD) y^T, with y a tile of kCols rows; operand(a, k) loads step k of x.
template <class T, int kD, int kCols, class LoadA>
__device__ void product_transposed(float (&acc)[kCols / 8][4], const LoadA& operand, const T* y) {
  LaneAddress at = b_address(threadIdx.x % kWarp);
#pragma unroll
  for (int n = 0; n < kCols / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) acc[n][e] = 0;
  }
#pragma unroll
  for (int k = 0; k < kD / 16; ++k) {
    uint32_t a[4];
    operand(a, k);
#pragma unroll
    for (int n = 0; n < kCols / 16; ++n) {
      uint32_t b[4];
      load_matrices(b, y + tile_offset(16 * n + at.row, 2 * k + at.chunk, kD / 8));
      multiply_add<T>(acc[2 * n], a, b[0], b[1]);
      multiply_add<T>(acc[2 * n + 1], a, b[2], b[3]);
    }
  }
}

// acc (16 x kOut) += p (16 x kCols, as accumulators) y, with y kOut columns, from chunk0 on, of a tile of kCols rows
template <class T, int kD, int kCols, int kOut>
__device__ void product(float (&acc)[kOut / 8][4], const float (&p)[kCols / 8][4], const T* y, int chunk0) {
  LaneAddress at = b_transposed_address(threadIdx.x % kWarp);
#pragma unroll
  for (int k = 0; k < kCols / 16; ++k) {
    const float(&p0)[4] = p[2 * k];
    const float(&p1)[4] = p[2 * k + 1];
    uint32_t a[4] = {pack<T>(p0[0], p0[1]), pack<T>(p0[2], p0[3]), pack<T>(p1[0], p1[1]), pack<T>(p1[2], p1[3])};
#pragma unroll
    for (int n = 0; n < kOut / 16; ++n) {
      uint32_t b[4];
      load_matrices_transposed(b, y + tile_offset(16 * k + at.row, chunk0 + 2 * n + at.chunk, kD / 8));
      multiply_add<T>(acc[2 * n], a, b[0], b[1]);
      multiply_add<T>(acc[2 * n + 1], a, b[2], b[3]);
    }
  }
}

// The same where y holds an inf or a NaN that some rows must not see: 0 * NaN would reach them through the tensor cores.
// Term by term and slow; it runs only on tiles that are partly masked and hold such a value.
template <class T, int kD, int kCols, int kOut, class Visible>
__device__ void product_guarded(float (&acc)[kOut / 8][4], const float (&p)[kCols / 8][4], const T* y, int chunk0,
                                const Visible& visible) {
  int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int n = 0; n < kCols / 8; ++n) {
#pragma unroll 1
    for (int c = 0; c < 8; ++c) {
      int source = lane / 4 * 4 + c / 2;  // the lane of this row group that holds column c
      float upper = shuffle(c % 2 ? p[n][1] : p[n][0], source), lower = shuffle(c % 2 ? p[n][3] : p[n][2], source);
      int col = 8 * n + c;
      bool upper_sees = visible(acc_row(lane, 0), col), lower_sees = visible(acc_row(lane, 2), col);
#pragma unroll
      for (int o = 0; o < kOut / 8; ++o) {
        const T* at = y + tile_offset(col, chunk0 + o, kD / 8) + acc_col(lane, 0);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float value = widen(at[e]);
          if (upper_sees) acc[o][e] += upper * value;
          if (lower_sees) acc[o][2 + e] += lower * value;
        }
      }
    }
  }
}

// --- softmax ----------------------------------------------------------------------------------------------------------
// Scores s (16 x kCols) in units of log 2 become weights, and join what came before: the maximum and this lane's part of the
// sum of the weights of rows lane / 4 and lane / 4 + 8, and the sums over values.
template <int kCols, int kD>
__device__ void add_scores(float (&s)[kCols / 8][4], float (&max)[2], float (&sum)[2], float (&acc)[kD / 8][4]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float new_max = max[half];
#pragma unroll
    for (int n = 0; n < kCols / 8; ++n) new_max = fmaxf(new_max, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
    new_max = lanes_max<4>(new_max);
    float rescale = exp2_approx(max[half] - finite_max(new_max));
    max[half] = new_max;
    sum[half] *= rescale;
#pragma unroll
    for (int n = 0; n < kD / 8; ++n) {
      acc[n][2 * half] *= rescale;
      acc[n][2 * half + 1] *= rescale;
    }
  }
#pragma unroll
  for (int n = 0; n < kCols / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      s[n][e] = exp2_approx(s[n][e] - finite_max(max[e / 2]));
      sum[e / 2] += s[n][e];
    }
  }
}

// --- launch -----------------------------------------------------------------------------------------------------------
template <class Run> void dispatch_half(DType dtype, const Run& run) {
  dtype == DType::kF16 ? run(TypeTag<f16>{}) : run(TypeTag<bf16>{});
}

// run(TypeTag<f16 or bf16>, the padded head dim, whether there are terms), the last two as types.
template <class Run> void dispatch_mma(const Problem& problem, const Run& run) {
  dispatch_half(problem.dtype, [&](auto tag) {
    dispatch_kernel<64, 96, 128, 192, 256>(problem, [&](auto width, auto terms) { run(tag, width, terms); });
  });
}

}  // namespace
}  // namespace fastlm::cuda::attention
