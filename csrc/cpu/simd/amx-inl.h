// A block of a product in bf16 on AMX tiles: registers of 16 rows of 64 bytes. One instruction adds the product of two tiles
// to a third (Intel's architecture extensions reference, TDPBF16PS): rows of A, words of two terms, times rows of B, which
// span two rows of the factor each. That is how words lie here already, so that tiles are read in place.
#pragma once

#include <cstdint>
#include <cstring>

#if FASTLM_EMULATE_AMX
#include "amx_in_software.h"  // tests/kernels/amx
#endif
#include "vec.h"

namespace fastlm::cpu::FASTLM_ISA {
namespace {

constexpr int kTileRows = 16;

// The intrinsics do not tell the compiler which memory they read and write.
inline void settle_memory() { asm volatile("" ::: "memory"); }

// The tiles as they are used below, for the thread that holds it; before and after, they are another library's.
class TileScope {
 public:
  TileScope() {
    _tile_storeconfig(&before_);
    settle_memory();
    Config ours{};
    ours.palette = 1;
    for (int tile = 0; tile < 8; ++tile) ours.row_bytes[tile] = 64, ours.rows[tile] = kTileRows;
    settle_memory();
    _tile_loadconfig(&ours);
  }
  ~TileScope() {
    settle_memory();
    _tile_loadconfig(&before_);
  }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;

 private:
  struct alignas(64) Config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };
  static_assert(sizeof(Config) == 64);
  Config before_;
};

// `depth` words, at most a tile's, of each of 16 rows, from memory to a whole tile: zero beyond. By depth, the rows stand
// next to each other.
template <bool kByDepth> inline void pack_tile(const uint32_t* a, int64_t lda, int64_t depth, uint32_t* tile) {
  u32v rows[kTileRows] = {};
  for (int i = 0; i < (kByDepth ? depth : kTileRows); ++i) {
    rows[i] = kByDepth || depth == kTileRows
                  ? load_raw<u32v>(a + i * lda)
                  : (u32v)load_n(reinterpret_cast<const float*>(a + i * lda), static_cast<int>(depth));
  }
  if (kByDepth) transpose_from<kTileRows / 2>(rows);
  std::memcpy(tile, rows, sizeof rows);
}

// 16 rows and kVectors vectors of C: scale A B, or C + A B. Words are read as in gemm-inl.h.
template <bool kByDepth, bool kAdd, int kVectors>
inline void tile_block(int64_t depth, const uint32_t* a, int64_t lda, const uint32_t* b, int64_t ldb, float* c, int64_t ldc,
                       float scale) {
  static_assert(kVectors <= 2 && kLanes == 16);
  constexpr int64_t kWord = 4;
  alignas(64) uint32_t left[kTileRows * 16], right[kVectors][kTileRows * 16];
  settle_memory();
  if (kAdd) {
    _tile_loadd(0, c, ldc * kWord);
    if (kVectors == 2) _tile_loadd(1, c + kLanes, ldc * kWord);
  } else {
    _tile_zero(0);
    _tile_zero(1);
  }
  for (int64_t k = 0; k < depth; k += 16) {
    const int64_t words = depth - k < 16 ? depth - k : 16;
    const uint32_t *right_at = b + k * ldb;
    int64_t right_row = ldb, right_vector = kLanes;
    if (words < 16) {  // what lies beyond is not zero, and 0 times it may be NaN
      std::memset(right, 0, sizeof right);
      for (int v = 0; v < kVectors; ++v) {
        for (int64_t i = 0; i < words; ++i) std::memcpy(right[v] + i * 16, right_at + i * ldb + v * kLanes, 64);
      }
      right_at = right[0], right_row = 16, right_vector = kTileRows * 16;
    }
    if (kByDepth || words < 16) {
      pack_tile<kByDepth>(kByDepth ? a + k * lda : a + k, lda, words, left);
      settle_memory();
      _tile_loadd(2, left, 64);
    } else {
      _tile_loadd(2, a + k, lda * kWord);
    }
    _tile_loadd(3, right_at, right_row * kWord);
    _tile_dpbf16ps(0, 2, 3);
    if (kVectors == 2) {
      _tile_loadd(4, right_at + right_vector, right_row * kWord);
      _tile_dpbf16ps(1, 2, 4);
    }
  }
  _tile_stored(0, c, ldc * kWord);
  if (kVectors == 2) _tile_stored(1, c + kLanes, ldc * kWord);
  settle_memory();
  if (kAdd || scale == 1) return;
  for (int i = 0; i < kTileRows; ++i) {
    for (int v = 0; v < kVectors; ++v) store(c + i * ldc + v * kLanes, load(c + i * ldc + v * kLanes) * splat<f32v>(scale));
  }
}

// One row and vector of C + A B, in the order in which tile_block sums: left(k) is a vector of word k of A's row.
template <class Left, class Right> inline void add_row_by_tiles(int64_t words, const Left& left, const Right& right, float* c) {
  alignas(64) uint32_t a[kTileRows * 16] = {}, b[16 * 16];
  alignas(64) float sums[kTileRows * kLanes] = {};
  store(sums, load(c));
  for (int64_t k = 0; k < words; k += 16) {
    for (int64_t i = 0; i < 16; ++i) {
      const u32v l = k + i < words ? left(k + i) : u32v{}, r = k + i < words ? right(k + i) : u32v{};
      a[i] = l[0];
      std::memcpy(b + i * 16, &r, sizeof r);
    }
    tile_block<false, true, 1>(16, a, 16, b, 16, sums, kLanes, 1);
  }
  store(c, load(sums));
}

}  // namespace
}  // namespace fastlm::cpu::FASTLM_ISA
