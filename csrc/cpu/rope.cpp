#include "rope.h"

#include "isa.h"
#include "rows.h"

namespace fastlm::cpu {

void rope(DType dtype, const RopeShape& shape, const void* x, const void* cos, const void* sin, void* y,
          int64_t positions, int threads) {
  auto kernel = kernels_for(dtype).rope.of[static_cast<int>(dtype)];
  const bool past = past_caches(y, positions * shape.heads * shape.dim, dtype);
  parallel_for(threads, positions, row_grain(shape.heads * shape.dim), [&](int64_t begin, int64_t end) {
    kernel(shape, x, cos, sin, y, begin, end, past);
  });
}

}  // namespace fastlm::cpu
