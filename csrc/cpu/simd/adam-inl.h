// One step of Adam or AdamW: one pass over memory, 7 words a parameter (reads p, g, m, v; writes p, m, v).
#include <cstdint>

#include "adam.h"
#include "vec.h"

namespace fastlm::cpu::FASTLM_ISA {
namespace {

// a + w (b - a), taken from the nearer end, so that w = 1 gives b however large a is; torch.lerp does the same.
template <class V> inline V lerp(V a, V b, double w) {
  return w < 0.5 ? fma(splat<V>(w), b - a, a) : fma(splat<V>(w - 1), b - a, b);
}
// NaN in either stays NaN.
template <class V> inline V maximum(V a, V b) { return (a > b) | (a != a) ? a : b; }

template <class T, bool kAmsgrad>
void adam_step_of(T* param, const T* grad, T* m, T* v, T* top, int64_t n, const AdamScalars& s) {
  using V = vec_t<T>;
  for_each_vector<V>(n, [&](int64_t i, int count) {
    V p = load_count(param + i, count);
    V g = load_count(grad + i, count) * splat<V>(s.sign);
    if (s.l2 != 0) g = fma(p, splat<V>(s.l2), g);  // not 0 * p, which is NaN where p is infinite
    V first = lerp(load_count(m + i, count), g, 1 - s.beta1);
    V second = fma(g * g, splat<V>(1 - s.beta2), load_count(v + i, count) * splat<V>(s.beta2));
    store_count(m + i, first, count);
    store_count(v + i, second, count);
    if constexpr (kAmsgrad) {
      second = maximum(load_count(top + i, count), second);
      store_count(top + i, second, count);
    }
    V denominator = sqrt(second) / splat<V>(s.correction) + splat<V>(s.eps);
    store_count(param + i, p * splat<V>(s.decay) - splat<V>(s.step_size) * (first / denominator), count);
  });
}
template <class T>
void adam_step(void* param, const void* grad, void* m, void* v, void* top, int64_t n, const AdamScalars& scalars) {
  auto run = top != nullptr ? adam_step_of<T, true> : adam_step_of<T, false>;
  run(static_cast<T*>(param), static_cast<const T*>(grad), static_cast<T*>(m), static_cast<T*>(v), static_cast<T*>(top),
      n, scalars);
}

constexpr AdamKernels kAdamKernels = {FASTLM_FOR_FLOATS(adam_step)};

}  // namespace
}  // namespace fastlm::cpu::FASTLM_ISA
