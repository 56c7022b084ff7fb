#pragma once

#include <cstdint>

#include "../../dtype.h"

namespace fastlm::cpu {

// C = A B or C += A B. C is float, its elements in a row next to each other; A and B are of one dtype, and each has
// elements next to each other along its rows, or where it is turned along its columns. Strides lead to the next row, of
// a turned matrix to the next column, in elements.
struct Matmul {
  int64_t rows, cols, depth;
  const void *a, *b;
  float* c;
  int64_t a_stride, b_stride, c_stride;
  bool a_turned, b_turned, add;
};

// Indexed by DType; none for double.
struct MatmulKernels {
  // Rows [row, row_end) and columns [col, col_end) of C, at most tile_rows and tile_cols. `work` is uninitialised memory
  // of work_bytes, aligned to 64 bytes. An element of C does not depend on the tile that it is in.
  void (*tile[kNumFloatDTypes])(const Matmul& m, int64_t row, int64_t row_end, int64_t col, int64_t col_end, void* work);
  int64_t tile_rows, tile_cols, work_bytes;
};

}  // namespace fastlm::cpu
