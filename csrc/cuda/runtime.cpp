#include "runtime.h"

#include <cuda_runtime_api.h>
#include <dlfcn.h>

namespace fastlm::cuda {
namespace {

std::string dotted(int version) { return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10); }

}  // namespace

int runtime_version() { return CUDART_VERSION; }

// Asked of the driver itself, looked up at run time: nothing here links libcuda, and unlike the runtime's functions
// this one may be called before CUDA is initialised.
int driver_version() {
  void* driver = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_LOCAL);
  if (driver == nullptr) return 0;
  auto get_version = reinterpret_cast<int (*)(int*)>(dlsym(driver, "cuDriverGetVersion"));
  int version = 0;
  if (get_version == nullptr || get_version(&version) != 0) return 0;
  return version;
}

std::optional<std::string> driver_problem() {
  int driver = driver_version();
  if (driver == 0) return "no CUDA driver is installed on this machine";
  // Within one major version an older driver runs a newer runtime.
  if (driver / 1000 < CUDART_VERSION / 1000) {
    return "the CUDA driver supports CUDA " + dotted(driver) + ", older than CUDA " + dotted(CUDART_VERSION) +
           " that fastlm was built with: update the driver, or build fastlm with an older CUDA toolkit";
  }
  return std::nullopt;
}

}  // namespace fastlm::cuda
