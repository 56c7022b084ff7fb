// The instruction sets that the kernels are compiled for, best first, and the one table of kernels in use.
#pragma once

#include <vector>

#include "simd/kernels.h"

namespace fastlm::cpu {

// Names of the sets compiled into this binary, best first.
std::vector<const char*> compiled_isas();
// Those of them that this machine can run.
std::vector<const char*> usable_isas();

// The kernels in use: the best usable set, or the one that FASTLM_CPU_ISA or select_isa names.
const Kernels& kernels();
// Throws std::invalid_argument where this machine or binary lacks the set.
void select_isa(const char* name);

// float64 is compiled for the baseline alone: it is there to prove the formulas, not for speed.
const Kernels& kernels_for(DType dtype);

}  // namespace fastlm::cpu
