#pragma once

#include <cstdint>

#include "../dtype.h"
#include "simd/rope.h"

namespace fastlm::cpu {

// As in simd/rope.h.
void rope(DType dtype, const RopeShape& shape, const void* x, const void* cos, const void* sin, void* y,
          int64_t positions, int threads);

}  // namespace fastlm::cpu
