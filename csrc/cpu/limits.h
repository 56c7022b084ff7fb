// Loops that do nothing but reach the machine's limits; fastlm/benchmarks/limits.py times them.
#pragma once

#include <cstdint>

#include "../dtype.h"

namespace fastlm::cpu {

// Multiplies and adds in registers on every thread; returns the FLOPs done, 0 where the instruction set in use has no
// products of this dtype (kF32 or kBF16).
int64_t run_products(DType dtype, int64_t rounds, int threads);
// Reads a; returns the bytes moved.
int64_t run_read(const float* a, int64_t n, int threads);
// a = a / 2 + b; returns the bytes moved.
int64_t run_update(float* a, const float* b, int64_t n, int threads);

}  // namespace fastlm::cpu
