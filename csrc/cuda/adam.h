#pragma once

#include <cstdint>
#include <vector>

#include "../dtype.h"
#include "target.h"

namespace fastlm::cuda {

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

// As in cpu/adam.h. Some fifty parameters share a launch; one that is not flat takes a launch of its own.
void adam_step(const Target& target, const std::vector<AdamItem>& items, const AdamOptions& options);

}  // namespace fastlm::cuda
