#include "dropout.h"

#include "isa.h"
#include "rows.h"

namespace fastlm::cpu {

Dropout dropout_of(double p, uint64_t seed) { return {static_cast<uint32_t>(p * 4294967296.0), 1 / (1 - p), seed}; }

void dropout(DType dtype, const Dropout& d, const void* x, void* y, int64_t n, int threads) {
  auto kernel = kernels_for(dtype).dropout.forward[static_cast<int>(dtype)];
  parallel_for(threads, n, kGrain, [&](int64_t begin, int64_t end) {
    kernel(at(x, begin, dtype), at(y, begin, dtype), begin, end - begin, d.seed, d.drop_below, d.keep_scale);
  });
}

}  // namespace fastlm::cpu
