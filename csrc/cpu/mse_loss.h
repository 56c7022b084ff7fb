#pragma once

#include <cstdint>

#include "../dtype.h"

namespace fastlm::cpu {

// As in simd/mse_loss.h. The sum does not depend on the number of threads.
double mse_loss_forward(DType dtype, const void* x, const void* target, int64_t n, int threads);
void mse_loss_backward(DType dtype, const void* x, const void* target, double scale, void* dx, int64_t n, int threads);

}  // namespace fastlm::cpu
