#pragma once

#include <cstdint>

#include "../../dtype.h"

namespace fastlm::cpu {

// Over flat arrays. Indexed by DType.
struct MseLossKernels {
  // The sum of (x - target)^2.
  double (*forward[kNumFloatDTypes])(const void* x, const void* target, int64_t n);
  // dx = scale (x - target).
  void (*backward[kNumFloatDTypes])(const void* x, const void* target, double scale, void* dx, int64_t n, bool past_caches);
};

}  // namespace fastlm::cpu
