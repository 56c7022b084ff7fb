// One Adam step as the bindings hand it to the CPU and CUDA kernels.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace fastlm {

enum { kParam, kGrad, kExpAvg, kExpAvgSq, kMaxExpAvgSq, kAdamTensors };

// One parameter and what belongs to it: same sizes, and same dtype, but for the three tensors of the state on the CPU.
struct AdamItem {
  static constexpr int kMaxDims = 8;
  DType dtype, state_dtype;
  DType dtype_of(int tensor) const { return tensor == kParam || tensor == kGrad ? dtype : state_dtype; }
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
  double scale = 1;         // of the gradients
  bool stochastic = false;  // see cpu/simd/adam.h
};

}  // namespace fastlm
