#include "embedding.h"

#include <stdexcept>
#include <string>

#include "isa.h"
#include "rows.h"

namespace fastlm::cpu {

void embedding_backward(DType dtype, const void* dy, const int64_t* index, int64_t count, void* dweight, int64_t rows,
                        int64_t cols, int64_t padding, int threads) {
  // The places of each index, by counting.
  std::vector<int64_t> starts(rows + 1), tokens(count);
  for (int64_t i = 0; i < count; ++i) {
    if (index[i] < 0 || index[i] >= rows) {
      throw std::out_of_range("embedding_backward: an index must be 0 to " + std::to_string(rows - 1) + ", got " +
                              std::to_string(index[i]));
    }
    if (index[i] != padding) ++starts[index[i] + 1];
  }
  for (int64_t row = 0; row < rows; ++row) starts[row + 1] += starts[row];
  std::vector<int64_t> next(starts.begin(), starts.end() - 1);
  for (int64_t i = 0; i < count; ++i) {
    if (index[i] != padding) tokens[next[index[i]]++] = i;
  }

  auto kernel = kernels_for(dtype).embedding.backward[static_cast<int>(dtype)];
  const bool past = past_caches(dweight, rows * cols, dtype);
  // Tasks of about one size, in columns too: one row may have most of the places.
  constexpr int64_t kCols = 256;
  const int64_t col_parts = (cols + kCols - 1) / kCols, work = rows + starts[rows];
  const int64_t row_parts = std::max<int64_t>(1, std::min(rows, work * cols / kGrain / std::max<int64_t>(1, col_parts)));
  auto work_before = [&](int64_t row) { return row + starts[row]; };
  auto row_at = [&](int64_t part) {  // the first row that has so much work before it
    int64_t low = 0, high = rows;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      work_before(middle) * row_parts < work * part ? low = middle + 1 : high = middle;
    }
    return low;
  };
  parallel_tasks(work * cols < kGrain ? 1 : threads, row_parts * col_parts, [&](int64_t task, int) {
    const int64_t part = task / col_parts, col = task % col_parts * kCols;
    kernel(dy, tokens.data(), starts.data(), dweight, cols, row_at(part), row_at(part + 1), col, std::min(cols, col + kCols),
           past);
  });
}

}  // namespace fastlm::cpu
