#pragma once

#include <cstdint>

#include "../../dtype.h"

namespace fastlm::cpu {

// Positions of `heads` rows of `dim` elements each, dense; of each row the pairs (i, half + i), i < half, are turned by the
// angle whose cosine and sine stand in row `position % table_rows` of the tables, (table_rows, half), float; double for
// float64. The rest of a row is copied.
struct RopeShape {
  int64_t heads, dim, half, table_rows;
};

struct RopeKernels {
  // positions [begin, end)
  void (*of[kNumFloatDTypes])(const RopeShape& s, const void* x, const void* cos, const void* sin, void* y, int64_t begin,
                              int64_t end, bool past_caches);
};

}  // namespace fastlm::cpu
