#pragma once

#include <cstdint>

#include "../dtype.h"
#include "target.h"

namespace fastlm::cuda {

// y = x / (1 - p) or, where a random word is below p * 2^32, 0, element by element of n; y may be x. `seed` is read on the
// device.
void dropout(const Target& target, DType dtype, const void* x, void* y, int64_t n, double p, const int64_t* seed);

}  // namespace fastlm::cuda
