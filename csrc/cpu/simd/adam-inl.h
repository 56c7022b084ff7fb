// One step of Adam or AdamW: one pass over memory, 7 words a parameter (reads p, g, m, v; writes p, m, v).
#include <cstdint>

#include "adam.h"
#include "vec.h"

namespace fastlm::cpu::FASTLM_ISA {
namespace {

template <class T, bool kAmsgrad>
void adam_step_of(T* param, const T* grad, T* m, T* v, T* top, int64_t n, const AdamScalars& s) {
  using V = vec_t<T>;
  // Outside the loop, since the compiler must think that a store may change what s refers to.
  const bool has_l2 = s.l2 != 0;
  const V sign = splat<V>(s.sign), l2 = splat<V>(s.l2), decay = splat<V>(s.decay), beta2 = splat<V>(s.beta2),
          rest2 = splat<V>(1 - s.beta2), step_size = splat<V>(s.step_size), correction = splat<V>(s.correction),
          eps = splat<V>(s.eps);
  // m + (1 - beta1) (g - m) starts from the nearer end, so that beta1 = 0 gives g however large m is; so does torch.
  const bool from_m = s.beta1 > 0.5;
  const V pull = splat<V>(from_m ? 1 - s.beta1 : -s.beta1);
  // No sum of two plain products: see fma in vec.h.
  for_each_vector<V>(n, [&](int64_t i, int count) {
    V p = load_count(param + i, count);
    V g = load_count(grad + i, count) * sign;
    if (has_l2) g = fma(p, l2, g);  // not 0 * p, which is NaN where p is infinite
    V first = load_count(m + i, count);
    first = fma(pull, g - first, from_m ? first : g);
    V second = fma(load_count(v + i, count), beta2, g * g * rest2);
    store_count(m + i, first, count);
    store_count(v + i, second, count);
    if constexpr (kAmsgrad) {
      second = maximum(load_count(top + i, count), second);
      store_count(top + i, second, count);
    }
    V denominator = sqrt(second) / correction + eps;
    store_count(param + i, p * decay - step_size * first / denominator, count);
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
