// One step of an optimizer as the bindings hand it to the CPU and CUDA kernels.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "host_device.h"

namespace fastlm {

// Of the states, kFirst is exp_avg or momentum_buffer, kSecond exp_avg_sq and kTop max_exp_avg_sq.
enum { kParam, kGrad, kFirst, kSecond, kTop, kMaster, kEma, kStepTensors };

// One parameter and what belongs to it, all of the same sizes.
struct StepItem {
  static constexpr int kMaxDims = 8;
  DType dtype, state_dtype;
  DType dtype_of(int tensor) const {
    if (tensor == kMaster || tensor == kEma) return sum_dtype(dtype);
    return tensor == kParam || tensor == kGrad ? dtype : state_dtype;
  }
  int64_t n;
  double step;                    // counting this one; unknown where it lies on a GPU, 0 where there is none
  bool flat;                      // dense with equal strides, so that memory order pairs the elements
  void* data[kStepTensors] = {};  // null where there is none; data[kGrad] is only read
  float* scales[2] = {};          // of kFirst and kSecond in 8 bits, one for each kStateBlock elements; such items are flat
  int ndim;
  int64_t shape[kMaxDims];
  int64_t strides[kStepTensors][kMaxDims];  // in elements
};

enum class StepRule : int { kAdam, kSgd };
constexpr int kNumStepRules = 2;

struct StepOptions {
  StepRule rule;
  double lr;
  double beta1, beta2, eps;          // Adam's
  double momentum, dampening;        // SGD's
  double weight_decay, l1, ema_decay;
  bool decoupled, nesterov, maximize;
  double scale;             // of the gradients
  bool stochastic;          // rounds v to bfloat16 up or down at random, so that on average it is not rounded at all
  bool stochastic_params;   // likewise the parameter
  uint32_t seed;
};

// --- random numbers, as in fastlm/_rounding.py ------------------------------------------------------------------------
FASTLM_HOST_DEVICE inline uint32_t adam_mixed(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// What those for m and v follow from, beside an element's number; `place` is the parameter's in the list.
FASTLM_HOST_DEVICE inline uint32_t adam_noise(double step, uint32_t place, uint32_t seed) {
  return adam_mixed(adam_mixed(static_cast<uint32_t>(step) + adam_mixed(seed)) ^ place * 0x9e3779b9u);
}
// The same for the parameter.
FASTLM_HOST_DEVICE inline uint32_t adam_noise_of_param(uint32_t noise) { return adam_mixed(noise ^ 0x5bd1e995u); }
// For element i: a sequence of even steps, scrambled by one multiplication. The highest bits are random enough to round by,
// and this is all that the step has time for.
FASTLM_HOST_DEVICE inline uint32_t adam_random(int64_t i, uint32_t noise) {
  uint32_t x = static_cast<uint32_t>(i) * 0x9e3779b9u + noise + static_cast<uint32_t>(i >> 32);
  return (x ^ (x >> 15)) * 0x846ca68bu;
}

// --- states in 8 bits, as in fastlm/_eight_bit.py ---------------------------------------------------------------------
constexpr int64_t kStateBlock = 256;
constexpr int kStateCut = 20;            // bits of the mantissa that a code leaves out
// What is added to them to round at random: the highest bits of an element's random number for the average of squares, and
// these of the same for that of gradients, which leave room for what division adds to 1: code 128 is a sign.
constexpr uint32_t kRandomOfMean = 0xffff0;
static_assert(kRandomOfMean + 2 < 1u << kStateCut);
constexpr float kLeastScale = 1e-30f;    // a block whose largest element is smaller becomes 0
// What is added to a code to give the highest bits of a float: the largest code is then 1.
constexpr int kFirstSigned = (127 << 3) - 127, kFirstUnsigned = (127 << 3) - 255;

}  // namespace fastlm
