// One step of Adam or AdamW: one pass over memory, 7 words a parameter (reads p, g, m, v; writes p, m, v).
#include <cstdint>

#include "optimizer.h"
#include "sums-inl.h"
#include "vec.h"

namespace fastlm::cpu::FASTLM_ISA {
namespace {

// adam_random_bits of a vector of elements.
inline u32v random_bits(int64_t i, uint32_t noise) {
  constexpr uint32_t kStep = 0x9e3779b9u;
  const u32v lanes = (u32v)lane_numbers<i32v>() * kStep;
  u32v x = lanes + (static_cast<uint32_t>(i) * kStep + noise + static_cast<uint32_t>(i >> 32));
  return ((x ^ (x >> 15)) * 0x846ca68bu) >> 16;
}
// Up with the probability of the part that is cut off; inf and NaN as they are.
inline void store_at_random(bf16* p, f32v x, u32v random, int count) {
  u32v bits = (u32v)x, quiet_nan = (bits & 0x007fffffu) != 0u ? (u32v{} + 0x00400000u) : u32v{};
  bits = (bits & 0x7f800000u) == 0x7f800000u ? bits | quiet_nan : bits + random;
  u16h rounded = narrow_bits(bits >> 16);
  if (count == kLanes) {
    std::memcpy(p, &rounded, sizeof rounded);
  } else {
    store_u16_n(p, rounded, count);
  }
}

template <class T, class V>
inline void store_rounded(T* p, V x, bool stochastic, int64_t i, uint32_t noise, int count) {
  if constexpr (std::is_same_v<T, bf16>) {
    if (stochastic) return store_at_random(p, x, random_bits(i, noise), count);
  }
  store_count(p, x, count);
}

template <class T, class S, bool kAmsgrad>
void adam_step_of(T* param, const T* grad, S* m, S* v, S* top, int64_t first, int64_t n, const StepScalars& s) {
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
    V mean = load_count(m + i, count);
    mean = fma(pull, g - mean, from_m ? mean : g);
    V second = fma(load_count(v + i, count), beta2, g * g * rest2);
    store_count(m + i, mean, count);
    store_rounded(v + i, second, s.stochastic, first + i, s.noise, count);
    if constexpr (kAmsgrad) {
      second = maximum(load_count(top + i, count), second);
      store_count(top + i, second, count);
    }
    V denominator = sqrt(second) / correction + eps;
    store_rounded(param + i, p * decay - step_size * mean / denominator, s.stochastic_params, first + i, s.noise_of_param,
                  count);
  });
}
template <class T, class S>
void adam_step(void* param, const void* grad, void* m, void* v, void* top, int64_t first, int64_t n,
               const StepScalars& scalars) {
  auto run = top != nullptr ? adam_step_of<T, S, true> : adam_step_of<T, S, false>;
  run(static_cast<T*>(param), static_cast<const T*>(grad), static_cast<S*>(m), static_cast<S*>(v), static_cast<S*>(top),
      first, n, scalars);
}

template <class T> double sum_of_squares(const void* x_, int64_t n) {
  const T* x = static_cast<const T*>(x_);
  return sums_over<1, vec_t<T>>(n, [&](int64_t i, int count, vec_t<T>(&out)[1]) {
           vec_t<T> v = load_count(x + i, count);
           out[0] = v * v;
         }).of[0];
}

constexpr OptimizerKernels kOptimizerKernels = {
    {{adam_step<float, float>, adam_step<float, bf16>, nullptr, nullptr},
     {adam_step<bf16, float>, adam_step<bf16, bf16>, nullptr, nullptr},
     {nullptr, nullptr, adam_step<f16, f16>, nullptr},
#if FASTLM_VECTOR_BYTES == 16
     {nullptr, nullptr, nullptr, adam_step<double, double>}},
#else
     {}},
#endif
    FASTLM_FOR_FLOATS(sum_of_squares)};

}  // namespace
}  // namespace fastlm::cpu::FASTLM_ISA
