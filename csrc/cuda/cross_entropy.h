#pragma once

#include <cstdint>

#include "../dtype.h"
#include "target.h"

namespace fastlm::cuda {

struct CrossEntropyShape {
  int64_t classes, ignored;  // a target equal to `ignored` has loss 0 and no gradient
  double smoothing;          // share of the target that is spread over all classes
  double softcap;            // c: logits are c tanh(x / c); 0: x
};

// Rows of `classes` elements, contiguous. loss and lse, and their gradients g and dlse (which may be null), are float; double for
// float64. A target that is no class and not ignored makes its row's results NaN: nobody can be told while kernels run.
//
// lse = log sum exp(z), loss = (1 - smoothing) (lse - z[target]) + smoothing (lse - mean(z)), z the logits
void cross_entropy_forward(const Target& device, DType dtype, const void* x, const int64_t* target, void* loss, void* lse,
                           int64_t rows, const CrossEntropyShape& shape);
// dx may be x.
void cross_entropy_backward(const Target& device, DType dtype, const void* g, const void* dlse, const void* x,
                            const int64_t* target, const void* lse, void* dx, int64_t rows, const CrossEntropyShape& shape);

}  // namespace fastlm::cuda
