#pragma once

#include <cstdint>

#include "../dtype.h"
#include "target.h"

namespace fastlm::cuda {

// sum = the sum of (x - y)^2 over n elements, float (double for float64); partial: mse_loss_chunks(n) of the same, to
// work in.
void mse_loss_forward(const Target& target, DType dtype, const void* x, const void* y, void* sum, void* partial, int64_t n);
int64_t mse_loss_chunks(int64_t n);
// dx = 2 g (x - y), g one float (double for float64) on the device.
void mse_loss_backward(const Target& target, DType dtype, const void* g, const void* x, const void* y, void* dx, int64_t n);

}  // namespace fastlm::cuda
