// What ops over rows share: offsets, how rows are split over threads, sums over columns.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

#include "../dtype.h"
#include "parallel.h"

namespace fastlm::cpu {

// Below this many elements a thread costs more to wake than it saves; measured with bench_relu, for cheap arithmetic.
constexpr int64_t kGrain = 1 << 15;

inline int64_t row_grain(int64_t cols) { return cols > 0 ? (kGrain + cols - 1) / cols : 1; }

// Whether an output of so many elements is written past the caches. They would lose it before it is read, and read every
// line of it from memory only to overwrite it. Not so where its pages are fresh: the system zeroes those in the caches.
bool past_caches(const void* output, int64_t elements, DType dtype);

inline const void* at(const void* base, int64_t offset, DType dtype) {
  return base == nullptr ? nullptr : static_cast<const char*>(base) + offset * size_of(dtype);
}
inline void* at(void* base, int64_t offset, DType dtype) {
  return base == nullptr ? nullptr : static_cast<char*>(base) + offset * size_of(dtype);
}

// body(first row, rows, sums) for chunks of rows. For each chunk it fills one row of `cols` sums, or two where out[1] is
// not null; they are added up into out[0] and out[1], of which either may be null. In the chunk they are of the dtype's
// sums, across chunks in double; the chunk does not depend on the number of threads, so neither does the result.
using Sums = std::array<void*, 2>;

template <class Sum, class Body>
void sum_by_chunks(int64_t rows, int64_t cols, const Sums& out, int threads, const Body& body) {
  const int64_t width = cols * (out[1] != nullptr ? 2 : 1);
  constexpr int64_t kRowChunk = 128;
  int64_t chunks = (rows + kRowChunk - 1) / kRowChunk;
  std::vector<Sum> partial(chunks * width);
  parallel_for(rows * cols < kGrain ? 1 : threads, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      int64_t row = chunk * kRowChunk;
      body(row, std::min(kRowChunk, rows - row), partial.data() + chunk * width);
    }
  });
  if (out[0] == nullptr && out[1] == nullptr) return;
  std::vector<double> sums(width);
  for (int64_t i = 0; i < chunks; ++i) {
    for (int64_t c = 0; c < width; ++c) sums[c] += partial[i * width + c];
  }
  for (int k = 0; k < 2; ++k) {
    auto* to = static_cast<Sum*>(out[k]);
    for (int64_t c = 0; to != nullptr && c < cols; ++c) to[c] = static_cast<Sum>(sums[k * cols + c]);
  }
}

// The same with sums of the dtype: double for double, float for the others.
template <class Body>
void sum_by_chunks(DType dtype, int64_t rows, int64_t cols, const Sums& out, int threads, const Body& body) {
  if (dtype == DType::kF64) {
    sum_by_chunks<double>(rows, cols, out, threads, body);
  } else {
    sum_by_chunks<float>(rows, cols, out, threads, body);
  }
}

}  // namespace fastlm::cpu
