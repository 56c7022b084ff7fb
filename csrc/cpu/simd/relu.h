#pragma once

#include <cstdint>

#include "../../dtype.h"

namespace fastlm::cpu {

// Arrays are dense, of n elements, or of `rows` rows with `cols` elements each. y may be x. Indexed by DType.
struct ReluKernels {
  // y = max(x, 0); y = max(x, 0)^2 where squared
  void (*forward[kNumFloatDTypes])(const void* x, void* y, int64_t n, bool squared);
  // dx = dy * [!(saved <= 0)], saved = the output; where squared dx = dy * 2 max(saved, 0), saved = the input
  void (*backward[kNumFloatDTypes])(const void* dy, const void* saved, void* dx, int64_t n, bool squared);
  // y = act(x + bias)
  void (*bias_forward[kNumFloatDTypes])(const void* x, const void* bias, void* y, int64_t rows, int64_t cols, bool squared);
  // dx as in backward, saved = the output, or x where squared; column_sums (float; double for float64) receives the sum
  // of dx over the rows, unrounded
  void (*bias_backward[kNumFloatDTypes])(const void* dy, const void* saved, const void* bias, void* dx, void* column_sums,
                                         int64_t rows, int64_t cols, bool squared);
};

}  // namespace fastlm::cpu
