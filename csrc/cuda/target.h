#pragma once

#include <cstdint>

namespace fastlm::cuda {

// Where a kernel runs: a device and a stream of it, as torch hands them out.
struct Target {
  int device;
  uintptr_t stream;
};

}  // namespace fastlm::cuda
