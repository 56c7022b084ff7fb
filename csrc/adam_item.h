// One Adam step as the bindings hand it to the CPU and CUDA kernels.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "host_device.h"

namespace fastlm {

enum { kParam, kGrad, kExpAvg, kExpAvgSq, kMaxExpAvgSq, kAdamTensors };

// One parameter and what belongs to it: same sizes, and same dtype, but for the three tensors of the state.
struct AdamItem {
  static constexpr int kMaxDims = 8;
  DType dtype, state_dtype;
  DType dtype_of(int tensor) const { return tensor == kParam || tensor == kGrad ? dtype : state_dtype; }
  int64_t n;
  double step;                    // counting this one; unknown where it lies on a GPU
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
  bool stochastic = false;  // rounds v to bfloat16 up or down at random, so that on average it is not rounded at all
  bool stochastic_params = false;  // likewise the parameter
  uint32_t seed = 0;
};

// --- random numbers, as in fastlm/_rounding.py ------------------------------------------------------------------------
FASTLM_HOST_DEVICE inline uint32_t adam_mixed(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// What those for v follow from, beside an element's number; `place` is the parameter's in the list.
FASTLM_HOST_DEVICE inline uint32_t adam_noise(double step, uint32_t place, uint32_t seed) {
  return adam_mixed(adam_mixed(static_cast<uint32_t>(step) + adam_mixed(seed)) ^ place * 0x9e3779b9u);
}
// The same for the parameter.
FASTLM_HOST_DEVICE inline uint32_t adam_noise_of_param(uint32_t noise) { return adam_mixed(noise ^ 0x5bd1e995u); }
// 16 bits for element i: a sequence of even steps, scrambled by one multiplication. No more is needed to round by, and
// this is all that the step has time for.
FASTLM_HOST_DEVICE inline uint32_t adam_random_bits(int64_t i, uint32_t noise) {
  uint32_t x = static_cast<uint32_t>(i) * 0x9e3779b9u + noise + static_cast<uint32_t>(i >> 32);
  return ((x ^ (x >> 15)) * 0x846ca68bu) >> 16;
}

}  // namespace fastlm
