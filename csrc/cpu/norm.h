#pragma once

#include <cstdint>

#include "../dtype.h"

namespace fastlm::cpu {

// As in simd/norm.h.
void norm_forward(DType dtype, const void* x, const void* residual, const void* weight, const void* bias, void* y,
                  void* sum, int64_t rows, int64_t cols, double eps, bool centred, int threads);
// dweight and dbias may be null.
void norm_backward(DType dtype, const void* dy, const void* dsum, const void* s, const void* weight, void* dx,
                   void* dweight, void* dbias, int64_t rows, int64_t cols, double eps, bool centred, int threads);

}  // namespace fastlm::cpu
