#pragma once

#include <cstdint>

#include "../../dtype.h"

namespace fastlm::cpu {

// The scalars of one step on one parameter. Double: they are rounded once, where they meet the elements.
struct StepScalars {
  double sign;          // -1 to maximize, else 1, times what the gradients are scaled by
  double l2;            // weight decay that is added to the gradient
  double decay;         // 1 - lr * weight decay, which scales the parameter
  double beta1, beta2;
  double step_size;     // lr / (1 - beta1^t)
  double correction;    // sqrt(1 - beta2^t)
  double eps;
  bool stochastic, stochastic_params;    // round v and the parameter to bfloat16 at random
  uint32_t noise, noise_of_param;        // what these random numbers follow from, beside an element's number
};

// Arrays are dense, of n elements each, the first of which is number `first` of its parameter. Indexed by the DType of
// param and grad and that of m, v and top: both the same, or one float and one bfloat16. The 16-bit types are computed in
// float and rounded when stored.
struct OptimizerKernels {
  // g = sign * grad + l2 * param;  m += (1 - beta1) (g - m);  v = beta2 v + (1 - beta2) g^2;  top = max(top, v);
  // param = decay * param - step_size * m / (sqrt(v) / correction + eps), with top for v where top is not null
  void (*step[kNumFloatDTypes][kNumFloatDTypes])(void* param, const void* grad, void* m, void* v, void* top,
                                                 int64_t first, int64_t n, const StepScalars& scalars);
  double (*sum_of_squares[kNumFloatDTypes])(const void* x, int64_t n);
};

}  // namespace fastlm::cpu
