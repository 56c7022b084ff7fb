// Rotary positions (Su et al., arXiv:2104.09864), both halves of a row in one pass.
#include <cstdint>
#include <cstring>

#include "rope.h"
#include "vec.h"

namespace fastlm::cpu::FASTLM_ISA {
namespace {

template <class T>
void rope(const RopeShape& s, const void* x_, const void* cos_, const void* sin_, void* y_, int64_t begin, int64_t end,
          bool past_caches) {
  using V = vec_t<T>;
  using C = compute_t<T>;
  const Output output(past_caches);
  const T* x = static_cast<const T*>(x_) + begin * s.heads * s.dim;
  T* y = static_cast<T*>(y_) + begin * s.heads * s.dim;
  for (int64_t position = begin; position < end; ++position) {
    const int64_t angle = position % s.table_rows * s.half;
    const C *cos = static_cast<const C*>(cos_) + angle, *sin = static_cast<const C*>(sin_) + angle;
    for (int64_t head = 0; head < s.heads; ++head, x += s.dim, y += s.dim) {
      for_each_vector<V>(s.half, [&](int64_t i, int count) {
        V a = load_count(x + i, count), b = load_count(x + s.half + i, count);
        V c = load_count(cos + i, count), d = load_count(sin + i, count);
        output.store_count(y + i, fma(a, c, -(b * d)), count);
        output.store_count(y + s.half + i, fma(b, c, a * d), count);
      });
      if (s.dim > 2 * s.half) std::memcpy(y + 2 * s.half, x + 2 * s.half, (s.dim - 2 * s.half) * sizeof(T));
    }
  }
}

constexpr RopeKernels kRopeKernels = {FASTLM_FOR_FLOATS(rope)};

}  // namespace
}  // namespace fastlm::cpu::FASTLM_ISA
