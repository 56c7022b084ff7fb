#pragma once

#include <vector>

#include "../optimizer_item.h"
#include "target.h"

namespace fastlm::cuda {

// One number in device memory: float, or double where it is wide.
struct DeviceScalar {
  void* data = nullptr;
  bool wide = false;
};

// What a step reads from device memory, so that a CUDA graph finds it anew; all may be missing.
struct StepOnDevice {
  DeviceScalar scale;               // of the gradients
  DeviceScalar found_inf;           // other than 0, nothing is written and the step not counted
  std::vector<DeviceScalar> steps;  // of all parameters or of none: steps taken before this one, which is counted there
  DeviceScalar lr;                  // instead of the options'; with steps here, or without any
  void* workspace = nullptr;        // with steps: kStepWorkspace doubles a parameter
};
constexpr int kStepWorkspace = 4;

// As in cpu/optimizer.h. With a driver for CUDA 13 some 300 to 400 parameters of one dtype share a launch; one that is not flat
// takes a launch of its own.
void optimizer_step(const Target& target, const std::vector<StepItem>& items, const StepOptions& options,
                    const StepOnDevice& on_device);

struct NormArray {
  const void* data;
  DType dtype;
  int64_t n;
};
// Elements of `partial`.
int64_t norm_chunks(const std::vector<NormArray>& arrays);
// norm = the 2-norm of all elements, by sums in an order that the sizes alone decide.
void norm_of(const Target& target, const std::vector<NormArray>& arrays, const DeviceScalar& norm, double* partial);

}  // namespace fastlm::cuda
