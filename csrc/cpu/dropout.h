#pragma once

#include <cstdint>

#include "../dtype.h"
#include "simd/dropout.h"

namespace fastlm::cpu {

struct Dropout {
  uint32_t drop_below;  // 0: none is dropped
  double keep_scale;    // 1 / (1 - p)
  uint64_t seed;
};
Dropout dropout_of(double p, uint64_t seed);

// y = x / (1 - p) or 0, element by element of n; y may be x.
void dropout(DType dtype, const Dropout& d, const void* x, void* y, int64_t n, int threads);

}  // namespace fastlm::cpu
