#pragma once

#include <cstdint>

#include "../dtype.h"
#include "target.h"

namespace fastlm::cuda {

// As in cpu/relu.h: tensors of n elements share one dense layout; y may be x. `saved` is the output of relu, or the
// input of squared relu.
void relu_forward(const Target& target, DType dtype, const void* x, void* y, int64_t n, bool squared);
void relu_backward(const Target& target, DType dtype, const void* dy, const void* saved, void* dx, int64_t n, bool squared);
void bias_act_forward(const Target& target, DType dtype, const void* x, const void* bias, void* y, int64_t rows,
                      int64_t cols, bool squared);
// dbias: cols sums, float (double for float64); partial: bias_act_chunks(rows) * cols of the same, to work in.
void bias_act_backward(const Target& target, DType dtype, const void* dy, const void* saved, const void* bias, void* dx,
                       void* dbias, void* partial, int64_t rows, int64_t cols, bool squared);
int64_t bias_act_chunks(int64_t rows);

}  // namespace fastlm::cuda
