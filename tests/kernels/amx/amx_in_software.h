// AMX tiles in software: what csrc/cpu/simd/amx-inl.h uses of them, written after Intel's description of each instruction,
// so that the kernels for them run on machines without. Chosen by FASTLM_EMULATE_AMX=ON.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {
namespace software_tiles {

struct Tile { uint32_t words[16][16]; };
struct Config {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static thread_local Tile tiles[8];
static thread_local Config config;

// Hardware raises an exception.
[[noreturn, maybe_unused]] static void fault(const char* why) {
  std::fprintf(stderr, "AMX in software: %s\n", why);
  std::abort();
}
static inline void check(int tile) {
  if (config.palette != 1) fault("a tile was used without a configuration");
  if (config.rows[tile] != 16 || config.row_bytes[tile] != 64) fault("a tile was used that is not configured");
}

// Denormals count as 0, and become 0.
static inline float flushed(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }
static inline float as_float(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, 4);
  return flushed(f);
}

[[maybe_unused]] static void store_config(void* p) { std::memcpy(p, &config, sizeof config); }
[[maybe_unused]] static void load_config(const void* p) {
  Config next;
  std::memcpy(&next, p, sizeof next);
  if (next.palette > 1 || next.start_row != 0) fault("a configuration that does not exist");
  for (int t = 0; next.palette == 1 && t < 16; ++t) {
    if (next.rows[t] > (t < 8 ? 16 : 0) || next.row_bytes[t] > 64) fault("a tile of a size that does not exist");
  }
  config = next;
  std::memset(tiles, 0, sizeof tiles);
}
[[maybe_unused]] static void zero(int tile) {
  check(tile);
  std::memset(&tiles[tile], 0, sizeof(Tile));
}
[[maybe_unused]] static void load(int tile, const void* p, int64_t stride) {
  check(tile);
  for (int r = 0; r < 16; ++r) std::memcpy(tiles[tile].words[r], static_cast<const char*>(p) + r * stride, 64);
}
[[maybe_unused]] static void store(int tile, void* p, int64_t stride) {
  check(tile);
  for (int r = 0; r < 16; ++r) std::memcpy(static_cast<char*>(p) + r * stride, tiles[tile].words[r], 64);
}
// Even and odd terms are summed apart, and their sum is added at the end.
[[maybe_unused]] static void dot(int into, int left, int right) {
  check(into), check(left), check(right);
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < 16; ++n) {
      float even = 0, odd = 0;
      for (int k = 0; k < 16; ++k) {
        uint32_t a = tiles[left].words[m][k], b = tiles[right].words[k][n];
        even = flushed(std::fma(as_float(a << 16), as_float(b << 16), even));
        odd = flushed(std::fma(as_float(a & 0xffff0000u), as_float(b & 0xffff0000u), odd));
      }
      float sum = flushed(as_float(tiles[into].words[m][n]) + flushed(even + odd));
      std::memcpy(&tiles[into].words[m][n], &sum, 4);
    }
  }
}

}  // namespace software_tiles
}  // namespace

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_storeconfig(p) software_tiles::store_config(p)
#define _tile_loadconfig(p) software_tiles::load_config(p)
#define _tile_zero(tile) software_tiles::zero(tile)
#define _tile_loadd(tile, p, stride) software_tiles::load(tile, p, stride)
#define _tile_stored(tile, p, stride) software_tiles::store(tile, p, stride)
#define _tile_dpbf16ps(into, left, right) software_tiles::dot(into, left, right)
