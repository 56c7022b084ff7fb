#pragma once

#include <cstdint>

namespace fastlm::cpu {

// What one core can do at most: arithmetic on registers, arithmetic on memory. Each returns a number that depends on
// all of its work, so that none of it is optimised away.
struct LimitsKernels {
  const int64_t fma_flops;  // of one round
  float (*fma)(int64_t rounds);
  const int64_t dot_bf16_flops;  // of one round
  float (*dot_bf16)(int64_t rounds);  // null where the set has no bf16 dot product
  float (*read)(const float* a, int64_t n);               // the sum of a
  void (*update)(float* a, const float* b, int64_t n);  // a = a / 2 + b
};

}  // namespace fastlm::cpu
