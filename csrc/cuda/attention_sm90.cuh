// What the two kernels for Hopper share: see attention_sm90_forward.cu.
#pragma once

#include <cstdlib>

#include "attention.cuh"
#include "hopper.cuh"

namespace fastlm::cuda::attention {
namespace {

constexpr int kConsumers = 2;  // warpgroups
constexpr int kTileRows = 64 * kConsumers;  // that a block owns
constexpr int kStages = 2;
constexpr int kBlockThreads = kWarpgroup * (1 + kConsumers);
constexpr int kConsumerWarps = kConsumers * kWarpgroup / kWarp;
constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;

// Where chunk `chunk` (8 elements) of a row lies in a tile of boxes of 64 columns, one after the other. In elements.
__device__ inline int box_offset(int row, int chunk, int rows) {
  return (chunk / 8 * rows + row) * 64 + ((chunk % 8) ^ (row & 7)) * 8;
}

// A tile's boxes, whose bytes a barrier waits for.
template <class T, int kRows, int kD>
__device__ void load_boxes(T* tile, const TensorMap* map, TileBarrier* full, int row, int64_t head, int64_t batch) {
#pragma unroll
  for (int c = 0; c < kD / 64; ++c) load_box(tile + c * kRows * 64, map, full, 64 * c, row, int(head), int(batch));
}

// The rows of a warp leave through its part of a tile: written as accumulators, times a factor for each half, ...
template <class T, int kD>
__device__ void put_rows(T* tile, int warp_row, const float (&acc)[kD / 8][4], float factor0, float factor1) {
  int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int n = 0; n < kD / 8; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float by = half ? factor1 : factor0;
      *reinterpret_cast<uint32_t*>(tile + box_offset(warp_row + acc_row(lane, 2 * half), n, kTileRows) + acc_col(lane, 0)) =
          pack<T>(acc[n][2 * half] * by, acc[n][2 * half + 1] * by);
    }
  }
}
// ... and stored in 16-byte pieces as rows `first` on of a matrix.
template <class T, int kD>
__device__ void store_tile_rows(const T* tile, int warp_row, T* matrix, int64_t stride, int first, int rows, int width) {
#pragma unroll 2
  for (int i = threadIdx.x % kWarp; i < 16 * (kD / 8); i += kWarp) {
    int row = i / (kD / 8), chunk = i % (kD / 8);
    if (first + row >= rows || 8 * chunk >= width) continue;
    Vector<T> x = *reinterpret_cast<const Vector<T>*>(tile + box_offset(warp_row + row, chunk, kTileRows));
    store_count(matrix + (first + row) * stride + 8 * chunk, x, width - 8 * chunk, true);
  }
}

// Whether an accumulator of this warp is no number.
template <int kSize> __device__ bool warp_has_nonfinite(const float (&acc)[kSize][4]) {
  float found = 0;
#pragma unroll
  for (int n = 0; n < kSize; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (!(fabsf(acc[n][e]) < INFINITY)) found = 1;
    }
  }
  return lanes_max<kWarp>(found) > 0;
}

// d (64 x 8 kSize) = a b^T with a 64 rows of a tile of kTileRows, b one of kCols rows; does not commit.
template <class T, int kD, int kCols>
__device__ void start_transposed(float (&d)[kCols / 8][4], const T* a, const T* b) {
  TileDescriptor of_a = tile_descriptor(a, 16, 1024), of_b = tile_descriptor(b, 16, 1024);
#pragma unroll
  for (int step = 0; step < kD / 16; ++step) {
    int box = step / 4, col = step % 4 * 32;  // in bytes, as a row of a box has 128
    TileDescriptor a_step = of_a.after(box * kTileRows * 128 + col), b_step = of_b.after(box * kCols * 128 + col);
    if (step == 0) {
      wgmma_shared<T, kCols / 8, false>(d, a_step, b_step);
    } else {
      wgmma_shared<T, kCols / 8, true>(d, a_step, b_step);
    }
  }
}
// acc (64 x kD) += p y, with y a tile of kCols rows; does not commit.
template <class T, int kD, int kCols>
__device__ void start_product(float (&acc)[kD / 8][4], const uint32_t (&p)[kCols / 16][4], const T* y) {
  TileDescriptor of_y = tile_descriptor(y, kCols * 128, 1024);
#pragma unroll
  for (int step = 0; step < kCols / 16; ++step) wgmma_registers<T, kD / 8>(acc, p[step], of_y.after(step * 16 * 128));
}
// acc (64 x 64) = a^T b with a and b one box wide and kRows rows high, of tiles of kTileRows rows; does not commit.
template <class T, int kRows> __device__ void start_product_of_rows(float (&acc)[8][4], const T* a, const T* b) {
  TileDescriptor of_a = tile_descriptor(a, kTileRows * 128, 1024), of_b = tile_descriptor(b, kTileRows * 128, 1024);
#pragma unroll
  for (int step = 0; step < kRows / 16; ++step) {
    if (step == 0) {
      wgmma_rows<T, false>(acc, of_a, of_b);
    } else {
      wgmma_rows<T, true>(acc, of_a.after(step * 16 * 128), of_b.after(step * 16 * 128));
    }
  }
}
// Two accumulators side by side as 16 columns of the operand of the next product.
template <class T> __device__ void as_operand(uint32_t (&p)[4], const float (&left)[4], const float (&right)[4]) {
  p[0] = pack<T>(left[0], left[1]), p[1] = pack<T>(left[2], left[3]);
  p[2] = pack<T>(right[0], right[1]), p[3] = pack<T>(right[2], right[3]);
}

// --- launch -----------------------------------------------------------------------------------------------------------
bool make_map(TensorMap* map, const Operand& x, DType dtype, int batch, int heads, int rows, int width, int box_rows) {
  int64_t sizes[4] = {batch, heads, rows, width}, strides[3] = {x.batch, x.head, x.row};
  for (int i = 0; i < 3; ++i) {
    if (sizes[i] == 1) strides[i] = (width + 7) / 8 * 8;  // never used, but it has to be one
    if (strides[i] <= 0) return false;
  }
  return make_tensor_map(map, x.data, dtype == DType::kF16, sizes, strides, box_rows);
}

// Positive scales alone, so that -inf stays what a hidden score is.
bool sm90_takes(const Target& target, const Problem& p, bool aligned) {
  return sm90_chosen(target) && aligned && p.keys > 0 && p.queries > 0 && std::max(p.width, p.width_v) <= 128 &&
         p.scale > 0 && !p.terms.any();
}

}  // namespace
}  // namespace fastlm::cuda::attention
