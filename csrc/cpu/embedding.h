#pragma once

#include <cstdint>

#include "../dtype.h"
#include "simd/embedding.h"

namespace fastlm::cpu {

// dweight (rows, cols): row v is the sum of the rows of dy (count, cols) whose index is v, in their order; 0 for the row
// `padding`, if there is one. Throws std::out_of_range where an index is none.
void embedding_backward(DType dtype, const void* dy, const int64_t* index, int64_t count, void* dweight, int64_t rows,
                        int64_t cols, int64_t padding, int threads);

}  // namespace fastlm::cpu
