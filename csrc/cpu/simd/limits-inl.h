// The fastest that this instruction set goes: what the benchmarks compare every kernel with.
#include <cstdint>

#if defined(__AMX_BF16__)
#include "amx-inl.h"
#endif
#include "limits.h"
#include "vec.h"

namespace fastlm::cpu::FASTLM_ISA {
namespace {

// Independent sums: two units of latency 4 need 8; more than 10 with two operands no longer fit AVX2's 16 registers.
constexpr int kChains = 10;

inline float fma_rounds(int64_t rounds) {
  f32v sums[kChains];
  for (int i = 0; i < kChains; ++i) sums[i] = splat<f32v>(i);
  f32v a = splat<f32v>(0.5f), b = splat<f32v>(0.25f);
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 10
    for (int i = 0; i < kChains; ++i) sums[i] = fma(sums[i], a, b);
  }
  f32v total{};
  for (int i = 0; i < kChains; ++i) total += sums[i];
  return reduce_add(total);
}

#if defined(__AMX_BF16__)
constexpr int64_t kDotFlops = 4 * 2 * 16 * 16 * 32;
inline float dot_bf16_rounds(int64_t rounds) {
  const TileScope scope;
  uint32_t halves[256];  // 0.5
  float sums[256];
  for (uint32_t& word : halves) word = 0x3f003f00u;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  settle_memory();
  _tile_loadd(4, halves, 64);
  _tile_loadd(5, halves, 64);
  for (int64_t round = 0; round < rounds; ++round) {
    _tile_dpbf16ps(0, 4, 5);
    _tile_dpbf16ps(1, 4, 5);
    _tile_dpbf16ps(2, 4, 5);
    _tile_dpbf16ps(3, 4, 5);
  }
  float total = 0;
  auto add = [&] {
    settle_memory();
    total += sums[0] + sums[255];
  };
  _tile_stored(0, sums, 64);
  add();
  _tile_stored(1, sums, 64);
  add();
  _tile_stored(2, sums, 64);
  add();
  _tile_stored(3, sums, 64);
  add();
  return total;
}
#elif defined(__AVX512BF16__)
constexpr int64_t kDotFlops = 4 * kLanes * kChains;
inline float dot_bf16_rounds(int64_t rounds) {
  __m512 sums[kChains];
  for (int i = 0; i < kChains; ++i) sums[i] = _mm512_set1_ps(i);
  __m512bh a = (__m512bh)_mm512_set1_epi16(0x3f00), b = (__m512bh)_mm512_set1_epi16(0x3e80);  // 0.5, 0.25
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 10
    for (int i = 0; i < kChains; ++i) sums[i] = _mm512_dpbf16_ps(sums[i], a, b);
  }
  __m512 total = _mm512_setzero_ps();
  for (int i = 0; i < kChains; ++i) total = _mm512_add_ps(total, sums[i]);
  return reduce_add((f32v)total);
}
#endif

inline float read_floats(const float* a, int64_t n) {
  constexpr int kStep = 4;  // independent sums, or the addition's latency would be measured
  f32v sums[kStep] = {};
  int64_t i = 0;
  for (; i + kStep * kLanes <= n; i += kStep * kLanes) {
    for (int k = 0; k < kStep; ++k) sums[k] += load(a + i + k * kLanes);
  }
  return reduce_add(sums[0] + sums[1] + sums[2] + sums[3]);
}

inline void update_floats(float* a, const float* b, int64_t n) {
  f32v half = splat<f32v>(0.5f);
  for_each_vector<f32v>(n, [&](int64_t i, int count) {
    store_count(a + i, fma(load_count(a + i, count), half, load_count(b + i, count)), count);
  });
}

constexpr LimitsKernels kLimitsKernels = {
    2 * kLanes * kChains, fma_rounds,
#if defined(__AVX512BF16__)
    kDotFlops, dot_bf16_rounds,
#else
    0, nullptr,
#endif
    read_floats, update_floats,
};

}  // namespace
}  // namespace fastlm::cpu::FASTLM_ISA
