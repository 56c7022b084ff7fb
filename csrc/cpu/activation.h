#pragma once

#include <cstdint>

#include "../dtype.h"
#include "dropout.h"
#include "simd/activation.h"

namespace fastlm::cpu {

// Tensors of n elements share one dense layout; y may be x. What `saved` is, and rows: see simd/activation.h.
void act_forward(Act act, DType dtype, const void* x, void* y, int64_t n, int threads);
void act_backward(Act act, DType dtype, const void* dy, const void* saved, void* dx, int64_t n, int threads);
void bias_act_forward(Act act, DType dtype, const void* x, const void* bias, void* y, int64_t rows, int64_t cols,
                      const Dropout& dropout, int threads);
// dbias is float (double for float64), or null where it is not wanted.
void bias_act_backward(Act act, DType dtype, const void* dy, const void* saved, const void* bias, void* dx, void* dbias,
                       int64_t rows, int64_t cols, int threads);
void glu_forward(Act act, DType dtype, const void* gate, const void* up, void* y, int64_t rows, int64_t cols,
                 int64_t gate_row, int64_t up_row, int threads);
void glu_backward(Act act, DType dtype, const void* dy, const void* gate, const void* up, void* dgate, void* dup,
                  int64_t rows, int64_t cols, int64_t gate_row, int64_t up_row, int threads);

}  // namespace fastlm::cpu
