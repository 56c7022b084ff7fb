#pragma once

#include "../dtype.h"
#include "simd/matmul.h"

namespace fastlm::cpu {

// The result does not depend on the number of threads. Not for double.
void matmul(DType dtype, const Matmul& m, int threads);

}  // namespace fastlm::cpu
