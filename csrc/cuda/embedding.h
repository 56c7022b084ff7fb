#pragma once

#include <cstdint>

#include "../dtype.h"
#include "target.h"

namespace fastlm::cuda {

// y (count, cols): row i is row index[i] of weight (rows, cols), NaN where there is no such row: nobody can be told while
// kernels run.
void embedding_forward(const Target& target, DType dtype, const void* weight, const int64_t* index, void* y, int64_t count,
                       int64_t rows, int64_t cols);

// dweight (rows, cols), zero before: row v becomes the sum of the rows of dy whose index is v. index is sorted, and its
// element i belongs to row order[i] of dy. No index but rows of dweight counts, and not `padding`. partial:
// embedding_partial_rows(count) rows of cols float (double for float64), to work in.
void embedding_backward(const Target& target, DType dtype, const void* dy, const int64_t* index, const int64_t* order, void* dweight,
                        void* partial, int64_t count, int64_t rows, int64_t cols, int64_t padding);
int64_t embedding_partial_rows(int64_t count);

}  // namespace fastlm::cuda
