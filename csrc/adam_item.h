// One Adam step as the bindings hand it to the CPU and CUDA kernels.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace fastlm {

enum { kParam, kGrad, kExpAvg, kExpAvgSq, kMaxExpAvgSq, kAdamTensors };

// One parameter and what belongs to it: same dtype, same sizes.
struct AdamItem {
  static constexpr int kMaxDims = 8;
  DType dtype;
  int64_t n;
  double step;                    // counting this one
  bool flat;                      // dense with equal strides, so that memory order pairs the elements
  void* data[kAdamTensors] = {};  // data[kMaxExpAvgSq] is null without amsgrad; data[kGrad] is only read
  int ndim;
  int64_t shape[kMaxDims];
  int64_t strides[kAdamTensors][kMaxDims];  // in elements
};

struct AdamOptions {
  double lr, beta1, beta2, eps, weight_decay;
  bool decoupled, maximize;
};

}  // namespace fastlm
