#pragma once

#include <cstdint>

#include "../act.h"
#include "../dtype.h"
#include "target.h"

namespace fastlm::cuda {

// As in cpu/activation.h: tensors of n elements share one dense layout; y may be x. `saved` is the output of none, relu,
// sigmoid and tanh, and the input of the others.
void act_forward(const Target& target, Act act, DType dtype, const void* x, void* y, int64_t n);
void act_backward(const Target& target, Act act, DType dtype, const void* dy, const void* saved, void* dx, int64_t n);
void bias_act_forward(const Target& target, Act act, DType dtype, const void* x, const void* bias, void* y, int64_t rows,
                      int64_t cols);
// bias may be null: none, or in `saved` already. dbias: cols sums, float (double for float64); partial:
// bias_act_chunks(rows) * cols of the same, to work in.
void bias_act_backward(const Target& target, Act act, DType dtype, const void* dy, const void* saved, const void* bias,
                       void* dx, void* dbias, void* partial, int64_t rows, int64_t cols);
int64_t bias_act_chunks(int64_t rows);
// y = act(gate) * up. Rows of gate and up begin gate_row and up_row elements apart, everything else is dense.
void glu_forward(const Target& target, Act act, DType dtype, const void* gate, const void* up, void* y, int64_t rows,
                 int64_t cols, int64_t gate_row, int64_t up_row);
void glu_backward(const Target& target, Act act, DType dtype, const void* dy, const void* gate, const void* up, void* dgate,
                  void* dup, int64_t rows, int64_t cols, int64_t gate_row, int64_t up_row);

}  // namespace fastlm::cuda
