#include "norm.h"

#include "isa.h"
#include "rows.h"

namespace fastlm::cpu {

void norm_forward(DType dtype, const void* x, const void* residual, const void* weight, const void* bias, void* y,
                  void* sum, int64_t rows, int64_t cols, double eps, bool centred, int threads) {
  auto kernel = kernels_for(dtype).norm.of[static_cast<int>(dtype)].forward;
  const bool past = past_caches(y, rows * cols, dtype);
  parallel_for(threads, rows, row_grain(cols), [&](int64_t begin, int64_t end) {
    int64_t offset = begin * cols;
    kernel(at(x, offset, dtype), at(residual, offset, dtype), weight, bias, at(y, offset, dtype), at(sum, offset, dtype),
           end - begin, cols, eps, centred, past);
  });
}

void norm_backward(DType dtype, const void* dy, const void* dsum, const void* s, const void* weight, void* dx,
                   void* dweight, void* dbias, int64_t rows, int64_t cols, double eps, bool centred, int threads) {
  auto kernel = kernels_for(dtype).norm.of[static_cast<int>(dtype)].backward;
  const bool past = past_caches(dx, rows * cols, dtype);
  sum_by_chunks(dtype, rows, cols, {dweight, dbias}, threads, [&](int64_t row, int64_t count, auto* sums) {
    int64_t offset = row * cols;
    kernel(at(dy, offset, dtype), at(dsum, offset, dtype), at(s, offset, dtype), weight, at(dx, offset, dtype),
           dweight != nullptr || dbias != nullptr ? sums : nullptr, dbias != nullptr ? sums + cols : nullptr, count, cols,
           eps, centred, past);
  });
}

}  // namespace fastlm::cpu
