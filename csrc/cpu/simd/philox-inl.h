// Dropout's random numbers, as fastlm/_dropout.py has them: Philox4x32-10 of an element's number and a seed.
#pragma once

#include <cstdint>
#include <cstring>

#include "vec.h"

namespace fastlm::cpu::FASTLM_ISA {
namespace {

typedef uint64_t u64v __attribute__((vector_size(FASTLM_VECTOR_BYTES)));

// The high and low words of x * b.
inline void multiply(u32v x, uint32_t b, u32v& high, u32v& low) {
  const u64v factor = u64v{} + b, words = u64v{} + 0xffffffffu;
#if defined(__AVX512F__)  // GCC 12 does not see that the upper words are 0
  u64v even = (u64v)_mm512_mul_epu32((__m512i)x, (__m512i)factor);
  u64v odd = (u64v)_mm512_mul_epu32((__m512i)((u64v)x >> 32), (__m512i)factor);
#elif defined(__AVX2__)
  u64v even = (u64v)_mm256_mul_epu32((__m256i)x, (__m256i)factor);
  u64v odd = (u64v)_mm256_mul_epu32((__m256i)((u64v)x >> 32), (__m256i)factor);
#else
  u64v even = ((u64v)x & words) * factor, odd = ((u64v)x >> 32) * factor;
#endif
  low = (u32v)((even & words) | (odd << 32));
  high = (u32v)((even >> 32) | (odd & ~words));
}

// keep[i] = whether element first + i is kept, as 1 or 0, for i < n.
inline void keep_of(uint64_t first, int64_t n, uint64_t seed, uint32_t threshold, uint8_t* keep) {
  constexpr int64_t kBlocks = kLanes;
  const u32v least = u32v{} + threshold;
  const int64_t phase = static_cast<int64_t>(first % 4);
  for (int64_t done = -phase; done < n; done += 4 * kBlocks) {
    const uint64_t counter = (first + done) / 4;
    u32v low = u32v{} + static_cast<uint32_t>(counter), lanes = (u32v)lane_numbers<i32v>();
    u32v words[4] = {low + lanes, u32v{} + static_cast<uint32_t>(counter >> 32), u32v{}, u32v{}};
    words[1] -= (u32v)(words[0] < low);  // a carry: the comparison is -1 where it holds
    uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
    for (int round = 0; round < 10; ++round) {
      u32v high0, low0, high1, low1;
      multiply(words[0], 0xD2511F53u, high0, low0);
      multiply(words[2], 0xCD9E8D57u, high1, low1);
      words[0] = high1 ^ words[1] ^ key[0];
      words[1] = low1;
      words[2] = high0 ^ words[3] ^ key[1];
      words[3] = low0;
      key[0] += 0x9E3779B9u, key[1] += 0xBB67AE85u;
    }
    u32v bytes{};  // of a lane's four elements
    for (int w = 0; w < 4; ++w) bytes |= (u32v)(words[w] >= least) & (u32v{} + (1u << (8 * w)));
    if (done >= 0 && n - done >= 4 * kBlocks) {
      std::memcpy(keep + done, &bytes, sizeof bytes);
      continue;
    }
    uint8_t block[4 * kBlocks];
    std::memcpy(block, &bytes, sizeof bytes);
    const int64_t from = done < 0 ? -done : 0, to = n - done < 4 * kBlocks ? n - done : 4 * kBlocks;
    for (int64_t i = from; i < to; ++i) keep[done + i] = block[i];
  }
}

}  // namespace
}  // namespace fastlm::cpu::FASTLM_ISA
