// csrc/cuda/runtime.cpp for the emulation, which needs no driver.
#include "cuda/runtime.h"

namespace fastlm::cuda {

int runtime_version() { return 0; }
int driver_version() { return 0; }
std::optional<std::string> driver_problem() { return std::nullopt; }

}  // namespace fastlm::cuda
