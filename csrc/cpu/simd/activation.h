#pragma once

#include <cstdint>

#include "../../act.h"
#include "../../dtype.h"

namespace fastlm::cpu {

// Arrays are dense, of n elements, or of `rows` rows with `cols` elements each, those of gate and up `gate_row` and `up_row`
// elements apart. y may be x, unless it goes past the caches (vec.h). Backward, `saved` is the output of relu, sigmoid and tanh (of none, either), and the input of
// the others.
struct ActivationKernels {
  struct OfDType {
    // y = act(x)
    void (*forward)(const void* x, void* y, int64_t n, bool past_caches);
    void (*backward)(const void* dy, const void* saved, void* dx, int64_t n, bool past_caches);
    // y = act(x + bias)
    void (*bias_forward)(const void* x, const void* bias, void* y, int64_t rows, int64_t cols, bool past_caches);
    // `saved` is the output, or x, or x + bias with a null bias; column_sums (float; double for float64) receives the sum of dx over the rows, unrounded
    void (*bias_backward)(const void* dy, const void* saved, const void* bias, void* dx, void* column_sums, int64_t rows,
                          int64_t cols, bool past_caches);
    // y = act(gate) * up
    void (*glu_forward)(const void* gate, const void* up, void* y, int64_t rows, int64_t cols, int64_t gate_row,
                        int64_t up_row, bool past_caches);
    // The gradients are dense.
    void (*glu_backward)(const void* dy, const void* gate, const void* up, void* dgate, void* dup, int64_t rows,
                         int64_t cols, int64_t gate_row, int64_t up_row, bool past_caches);
  };
  OfDType of[kNumActs][kNumFloatDTypes];
};

}  // namespace fastlm::cpu
