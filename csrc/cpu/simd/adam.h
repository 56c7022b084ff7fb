#pragma once

#include <cstdint>

#include "../../dtype.h"

namespace fastlm::cpu {

// The scalars of one step on one parameter. Double: they are rounded once, where they meet the elements.
struct AdamScalars {
  double sign;          // -1 to maximize, else 1
  double l2;            // weight decay that is added to the gradient
  double decay;         // 1 - lr * weight decay, which scales the parameter
  double beta1, beta2;
  double step_size;     // lr / (1 - beta1^t)
  double correction;    // sqrt(1 - beta2^t)
  double eps;
};

// Arrays are dense, of n elements each. Indexed by DType; the 16-bit types are computed in float and rounded when stored.
struct AdamKernels {
  // g = sign * grad + l2 * param;  m += (1 - beta1) (g - m);  v = beta2 v + (1 - beta2) g^2;  top = max(top, v);
  // param = decay * param - step_size * m / (sqrt(v) / correction + eps), with top for v where top is not null
  void (*step[kNumFloatDTypes])(void* param, const void* grad, void* m, void* v, void* top, int64_t n,
                                const AdamScalars& scalars);
};

}  // namespace fastlm::cpu
