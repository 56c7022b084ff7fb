#include "cross_entropy.h"

#include <stdexcept>
#include <string>

#include "isa.h"
#include "rows.h"

namespace fastlm::cpu {
namespace {

void check_targets(const int64_t* target, int64_t rows, const CrossEntropyShape& shape) {
  for (int64_t r = 0; r < rows; ++r) {
    if (target[r] == shape.ignored || (target[r] >= 0 && target[r] < shape.classes)) continue;
    throw std::out_of_range("fastlm.cross_entropy: a target must be a class, 0 to " + std::to_string(shape.classes - 1) +
                            ", or ignore_index, " + std::to_string(shape.ignored) + ", got " + std::to_string(target[r]));
  }
}

}  // namespace

void cross_entropy_forward(DType dtype, const void* x, const int64_t* target, void* loss, void* lse, int64_t rows,
                           const CrossEntropyShape& shape, int threads) {
  check_targets(target, rows, shape);
  auto kernel = kernels_for(dtype).cross_entropy.of[static_cast<int>(dtype)].forward;
  DType sum = sum_dtype(dtype);
  parallel_for(threads, rows, row_grain(shape.classes), [&](int64_t begin, int64_t end) {
    kernel(at(x, begin * shape.classes, dtype), target + begin, at(loss, begin, sum), at(lse, begin, sum), end - begin,
           shape);
  });
}

void cross_entropy_backward(DType dtype, const void* g, const void* dlse, const void* x, const int64_t* target,
                            const void* lse, void* dx, int64_t rows, const CrossEntropyShape& shape, int threads) {
  check_targets(target, rows, shape);
  auto kernel = kernels_for(dtype).cross_entropy.of[static_cast<int>(dtype)].backward;
  const bool past = x != dx && past_caches(dx, rows * shape.classes, dtype);
  DType sum = sum_dtype(dtype);
  parallel_for(threads, rows, row_grain(shape.classes), [&](int64_t begin, int64_t end) {
    kernel(at(g, begin, sum), at(dlse, begin, sum), at(x, begin * shape.classes, dtype), target + begin,
           at(lse, begin, sum), at(dx, begin * shape.classes, dtype), end - begin, shape, past);
  });
}

}  // namespace fastlm::cpu
