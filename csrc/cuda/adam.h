#pragma once

#include <vector>

#include "../adam_item.h"
#include "target.h"

namespace fastlm::cuda {

// As in cpu/adam.h. Some fifty parameters share a launch; one that is not flat takes a launch of its own.
void adam_step(const Target& target, const std::vector<AdamItem>& items, const AdamOptions& options);

}  // namespace fastlm::cuda
