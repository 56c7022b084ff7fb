#pragma once

#include <vector>

#include "../adam_item.h"

namespace fastlm::cpu {

// All parameters in one parallel region, shared out by elements. The result does not depend on the number of threads.
void adam_step(const std::vector<AdamItem>& items, const AdamOptions& options, int threads);

}  // namespace fastlm::cpu
