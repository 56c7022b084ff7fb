#pragma once

#include <cstdint>

#include "../dtype.h"

namespace fastlm::cpu {

void relu_forward(DType dtype, const void* x, void* y, int64_t n, bool squared, int threads);
void relu_backward(DType dtype, const void* dy, const void* saved, void* dx, int64_t n, bool squared, int threads);
void bias_act_forward(DType dtype, const void* x, const void* bias, void* y, int64_t rows, int64_t cols, bool squared,
                      int threads);
// dbias is float (double for float64), or null where it is not wanted.
void bias_act_backward(DType dtype, const void* dy, const void* saved, const void* bias, void* dx, void* dbias,
                       int64_t rows, int64_t cols, bool squared, int threads);

}  // namespace fastlm::cpu
