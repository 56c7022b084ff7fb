#pragma once

#include <cstdint>

#include "../../dtype.h"

namespace fastlm::cpu {

struct CrossEntropyShape {
  int64_t classes, ignored;  // a target equal to `ignored` has loss 0 and no gradient
  double smoothing;          // share of the target that is spread over all classes
  double softcap;            // c: logits are c tanh(x / c); 0: x
};

// Rows of `classes` elements, dense; targets in range or ignored. loss and lse, and their gradients g and dlse (which may
// be null), are float; double for float64. Indexed by DType.
struct CrossEntropyKernels {
  struct OfDType {
    // lse = log sum exp(z), loss = (1 - smoothing) (lse - z[target]) + smoothing (lse - mean(z)), z the logits
    void (*forward)(const void* x, const int64_t* target, void* loss, void* lse, int64_t rows, const CrossEntropyShape& s);
    void (*backward)(const void* g, const void* dlse, const void* x, const int64_t* target, const void* lse, void* dx,
                     int64_t rows, const CrossEntropyShape& s, bool past_caches);
  };
  OfDType of[kNumFloatDTypes];
};

}  // namespace fastlm::cpu
