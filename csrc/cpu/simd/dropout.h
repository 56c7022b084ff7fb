#pragma once

#include <cstdint>

#include "../../dtype.h"

namespace fastlm::cpu {

struct DropoutKernels {
  // y = x / (1 - p) where element first + i of the whole is kept, 0 where its random word is below drop_below. y may be x.
  void (*forward[kNumFloatDTypes])(const void* x, void* y, uint64_t first, int64_t n, uint64_t seed, uint32_t drop_below,
                                   double keep_scale);
};

}  // namespace fastlm::cpu
