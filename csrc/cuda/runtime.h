#pragma once

#include <optional>
#include <string>

namespace fastlm::cuda {

int runtime_version();  // of the runtime compiled in, as CUDA writes it: 13000 for 13.0
int driver_version();   // the newest CUDA that the installed driver supports; 0 where there is no driver
// Why this module cannot run here, or nothing. Initialises no CUDA, so that a process may still fork after it.
std::optional<std::string> driver_problem();

}  // namespace fastlm::cuda
