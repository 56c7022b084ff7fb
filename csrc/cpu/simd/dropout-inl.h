#include <cstdint>

#include "dropout.h"
#include "philox-inl.h"
#include "vec.h"

namespace fastlm::cpu::FASTLM_ISA {
namespace {

template <class T>
void dropout_forward(const void* x_, void* y_, uint64_t first, int64_t n, uint64_t seed, uint32_t drop_below,
                     double keep_scale) {
  using V = vec_t<T>;
  constexpr int64_t kChunk = 1024;
  const T* x = static_cast<const T*>(x_);
  T* y = static_cast<T*>(y_);
  const auto scale = static_cast<compute_t<T>>(keep_scale);
  uint8_t keep[kChunk];
  compute_t<T> factor[kChunk];
  for (int64_t begin = 0; begin < n; begin += kChunk, x += kChunk, y += kChunk) {
    const int64_t size = n - begin < kChunk ? n - begin : kChunk;
    keep_of(first + begin, size, seed, drop_below, keep);
    for (int64_t i = 0; i < size; ++i) factor[i] = keep[i] * scale;
    for_each_vector<V>(size, [&](int64_t i, int count) {
      const V f = load_count(factor + i, count);
      // Chosen, not multiplied: what is dropped may be NaN.
      store_count(y + i, f == V{} ? V{} : load_count(x + i, count) * f, count);
    });
  }
}

constexpr DropoutKernels kDropoutKernels = {FASTLM_FOR_FLOATS(dropout_forward)};

}  // namespace
}  // namespace fastlm::cpu::FASTLM_ISA
