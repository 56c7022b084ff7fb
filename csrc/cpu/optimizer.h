#pragma once

#include <vector>

#include "../optimizer_item.h"

namespace fastlm::cpu {

// All parameters in one parallel region, shared out by elements. The result does not depend on the number of threads.
void optimizer_step(const std::vector<StepItem>& items, const StepOptions& options, int threads);

struct DenseArray {
  const void* data;
  DType dtype;
  int64_t n;
};
// Likewise independent of the number of threads.
double sum_of_squares(const std::vector<DenseArray>& arrays, int threads);

}  // namespace fastlm::cpu
