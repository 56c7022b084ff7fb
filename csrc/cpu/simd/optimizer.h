#pragma once

#include <cstdint>

#include "../../optimizer_item.h"

namespace fastlm::cpu {

// old + (1 - keep) (x - old) from the nearer end, so that keep = 0 gives x however large the old is; so does torch.
struct AverageScalars {
  double pull;  // of x - old, which is added
  bool from_old;  // to the old, else to x
};

// The scalars of one step on one parameter. Double: they are rounded once, where they meet the elements.
struct StepScalars {
  double sign;          // -1 to maximize, else 1, times what the gradients are scaled by
  double l2, l1;        // weight decay and the weight of signs that are added to the gradient
  bool has_l2, has_l1;  // whether they are
  double decay;         // 1 - lr * weight decay, which scales the parameter
  double step_size;     // Adam's lr / (1 - beta1^t), or SGD's lr
  AverageScalars mean, ema;
  double beta2;
  double correction;    // 1 / sqrt(1 - beta2^t)
  double eps;
  double momentum, rest;                 // of the buffer; of the gradient in it
  bool starts, nesterov;                 // the buffer becomes the first gradient
  bool stochastic, stochastic_params;    // round v and the parameter to bfloat16 at random
  uint32_t noise, noise_of_param;  // what random numbers follow from, beside an element's number
};

// Arrays are dense, of n elements each, the first of which is number `first` of its parameter; null where there is none.
struct StepArrays {
  void* data[kStepTensors];
  float* scales[2];
};
// With 8 bits, `first` is a multiple of kStateBlock.
using StepKernel = void (*)(const StepArrays& arrays, int64_t first, int64_t n, const StepScalars& scalars);

// The 16-bit types are computed in float and rounded when stored.
struct OptimizerKernels {
  // p = master or param;  g = sign * grad + l2 * p + l1 * sign(p);  then by the rule
  // Adam: m += (1 - beta1) (g - m);  v = beta2 v + (1 - beta2) g^2;  top = max(top, v);
  //       p = decay * p - step_size * m / (sqrt(v) * correction + eps), with top for v where there is one
  // SGD:  m = starts ? g : momentum * m + rest * g;  g = nesterov ? g + momentum * m : m;  p -= step_size * g
  // and then param = master = p;  ema += (1 - ema_decay) (p - ema)
  StepKernel step[kNumStepRules][kNumFloatDTypes][kNumDTypes];  // by the DTypes of param and of states
  double (*sum_of_squares[kNumFloatDTypes])(const void* x, int64_t n);
};

}  // namespace fastlm::cpu
