#pragma once

#include <cstdint>

#include "../dtype.h"
#include "simd/cross_entropy.h"

namespace fastlm::cpu {

// As in simd/cross_entropy.h. Throws std::out_of_range for a target that is no class.
void cross_entropy_forward(DType dtype, const void* x, const int64_t* target, void* loss, void* lse, int64_t rows,
                           const CrossEntropyShape& shape, int threads);
void cross_entropy_backward(DType dtype, const void* g, const void* dlse, const void* x, const int64_t* target,
                            const void* lse, void* dx, int64_t rows, const CrossEntropyShape& shape, int threads);

}  // namespace fastlm::cpu
