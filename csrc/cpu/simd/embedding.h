#pragma once

#include <cstdint>

#include "../../dtype.h"

namespace fastlm::cpu {

struct EmbeddingKernels {
  // Rows [begin, end) of dweight, `cols` apart, in columns [col, col_end): each the sum of the rows of dy, likewise, that
  // tokens[starts[row]] to tokens[starts[row + 1] - 1] name, in that order.
  void (*backward[kNumFloatDTypes])(const void* dy, const int64_t* tokens, const int64_t* starts, void* dweight, int64_t cols,
                                    int64_t begin, int64_t end, int64_t col, int64_t col_end, bool past_caches);
};

}  // namespace fastlm::cpu
