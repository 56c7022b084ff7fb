// The gradient of an embedding: each of its rows is summed in registers and written once.
#include <cstdint>

#include "embedding.h"
#include "vec.h"

namespace fastlm::cpu::FASTLM_ISA {
namespace {

template <class T>
void embedding_backward(const void* dy_, const int64_t* tokens, const int64_t* starts, void* dweight_, int64_t cols,
                        int64_t begin, int64_t end, int64_t col, int64_t col_end, bool past_caches) {
  using V = vec_t<T>;
  constexpr int64_t kL = lanes_of<V>, kVectors = 4;
  const Output output(past_caches);
  const T* dy = static_cast<const T*>(dy_);
  T* dweight = static_cast<T*>(dweight_);
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t c = col; c < col_end; c += kVectors * kL) {
      V sums[kVectors] = {};
      auto each_vector = [&](auto step) {
        for (int n = 0; n < kVectors && c + n * kL < col_end; ++n) {
          const int64_t at = c + n * kL;
          step(n, at, static_cast<int>(col_end - at < kL ? col_end - at : kL));
        }
      };
      for (int64_t k = starts[row]; k < starts[row + 1]; ++k) {
        each_vector([&](int n, int64_t at, int count) { sums[n] += load_count(dy + tokens[k] * cols + at, count); });
      }
      each_vector([&](int n, int64_t at, int count) { output.store_count(dweight + row * cols + at, sums[n], count); });
    }
  }
}

constexpr EmbeddingKernels kEmbeddingKernels = {FASTLM_FOR_FLOATS(embedding_backward)};

}  // namespace
}  // namespace fastlm::cpu::FASTLM_ISA
