#pragma once

#include <cstdint>

#include "../dtype.h"
#include "target.h"

namespace fastlm::cuda {

// Rows of `dim` elements, `heads` of them for each position, contiguous; of each row the pairs (i, half + i), i < half, are turned
// by the angle whose cosine and sine stand in row `position % table_rows` of the tables, (table_rows, half), float; double for
// float64. The rest of a row is copied.
struct RopeShape {
  int64_t heads, dim, half, table_rows;
};

void rope(const Target& target, DType dtype, const RopeShape& shape, const void* x, const void* cos, const void* sin, void* y,
          int64_t positions);

}  // namespace fastlm::cuda
