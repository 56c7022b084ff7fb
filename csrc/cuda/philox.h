// Dropout's random numbers, as fastlm/_dropout.py has them: Philox4x32-10 of an element's number and a seed. Plain C++, so
// that a test can check it by itself.
#pragma once

#include <cstdint>

#include "../host_device.h"

namespace fastlm::cuda {

struct Philox {
  uint32_t words[4];

  FASTLM_HOST_DEVICE Philox(uint64_t counter, uint64_t seed) : words{uint32_t(counter), uint32_t(counter >> 32), 0, 0} {
    uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
#ifdef __CUDACC__
#pragma unroll
#endif
    for (int round = 0; round < 10; ++round) {
      uint64_t a = uint64_t(words[0]) * 0xD2511F53u, b = uint64_t(words[2]) * 0xCD9E8D57u;
      words[0] = uint32_t(b >> 32) ^ words[1] ^ key0;
      words[1] = uint32_t(b);
      words[2] = uint32_t(a >> 32) ^ words[3] ^ key1;
      words[3] = uint32_t(a);
      key0 += 0x9E3779B9u;
      key1 += 0xBB67AE85u;
    }
  }
};

// Word i of a block: by comparison, since an index would put them into memory.
FASTLM_HOST_DEVICE inline uint32_t word(const Philox& block, int i) {
  return i < 2 ? (i == 0 ? block.words[0] : block.words[1]) : i == 2 ? block.words[2] : block.words[3];
}

// Whether dropout keeps element n.
FASTLM_HOST_DEVICE inline bool kept(uint64_t n, uint64_t seed, uint32_t drop_below) {
  return word(Philox(n / 4, seed), int(n % 4)) >= drop_below;
}

// The same of elements n and n + 1, mostly from one block.
struct KeptPair {
  bool first, second;
};
FASTLM_HOST_DEVICE inline KeptPair kept_pair(uint64_t n, uint64_t seed, uint32_t drop_below) {
  Philox block(n / 4, seed);
  uint32_t first = word(block, int(n % 4)), second = word(block, int((n + 1) % 4));
  if (n % 4 == 3) second = Philox(n / 4 + 1, seed).words[0];
  return {first >= drop_below, second >= drop_below};
}

}  // namespace fastlm::cuda
