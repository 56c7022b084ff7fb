#pragma once

#include <cstdint>

#include "../dtype.h"
#include "target.h"

namespace fastlm::cuda {

// Rows of `cols` elements, contiguous. Weights, biases and their sums are float; double for float64. Any of them may be null,
// a missing weight is 1. Centred is layer norm; else the mean is taken for 0, which makes RMS norm.
//
// y = (s - mean) / sqrt(variance + eps) * weight + bias, s = x + residual, rounded and stored in sum; without residual, s = x,
// and sum is null.
void norm_forward(const Target& target, DType dtype, const void* x, const void* residual, const void* weight, const void* bias,
                  void* y, void* sum, int64_t rows, int64_t cols, double eps, bool centred);

// dx of s, with dsum, which may be null, added; and dweight, dbias, unrounded sums over the rows. `partial` has room for
// norm_slices() rows of `cols` sums for each of the two that is not null.
int64_t norm_slices(DType dtype, int64_t rows, int64_t cols);
void norm_backward(const Target& target, DType dtype, const void* dy, const void* dsum, const void* s, const void* weight, void* dx,
                   void* dweight, void* dbias, void* partial, int64_t rows, int64_t cols, double eps, bool centred);

}  // namespace fastlm::cuda
