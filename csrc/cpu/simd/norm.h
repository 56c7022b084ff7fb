#pragma once

#include <cstdint>

#include "../../dtype.h"

namespace fastlm::cpu {

// Rows of `cols` elements, dense. Weights, biases and their sums are float; double for float64. Any of them may be null,
// a missing weight is 1. Centred is layer norm; else the mean is taken for 0, which makes RMS norm. Indexed by DType.
struct NormKernels {
  struct OfDType {
    // y = (s - mean) / sqrt(variance + eps) * weight + bias, s = x + residual, rounded and stored in sum; without
    // residual, s = x, and sum is null.
    void (*forward)(const void* x, const void* residual, const void* weight, const void* bias, void* y, void* sum,
                    int64_t rows, int64_t cols, double eps, bool centred, bool past_caches);
    // dx of s, with dsum, which may be null, added; and dweight, dbias, unrounded sums over the rows.
    void (*backward)(const void* dy, const void* dsum, const void* s, const void* weight, void* dx, void* dweight,
                     void* dbias, int64_t rows, int64_t cols, double eps, bool centred, bool past_caches);
  };
  OfDType of[kNumFloatDTypes];
};

}  // namespace fastlm::cpu
