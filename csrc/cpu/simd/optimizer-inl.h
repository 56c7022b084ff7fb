// One step of Adam, AdamW or SGD: one pass over memory, in Adam 7 words a parameter (reads p, g, m, v; writes p, m, v).
#include <cstdint>

#include "optimizer.h"
#include "sums-inl.h"
#include "vec.h"

namespace fastlm::cpu::FASTLM_ISA {
namespace {

// adam_random_bits of a vector of elements: what is scrambled for those from i on, and 16 bits of it.
constexpr uint32_t kRandomStep = 0x9e3779b9u;
inline u32v random_at(int64_t i, uint32_t noise) {
  const u32v lanes = (u32v)lane_numbers<i32v>() * kRandomStep;
  return lanes + (static_cast<uint32_t>(i) * kRandomStep + noise + static_cast<uint32_t>(i >> 32));
}
inline u32v random_bits(u32v at) { return ((at ^ (at >> 15)) * 0x846ca68bu) >> 16; }
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
    if (stochastic) return store_at_random(p, x, random_bits(random_at(i, noise)), count);
  }
  store_count(p, x, count);
}

template <class V> struct Average {
  const V pull;
  const bool from_old;
  explicit Average(const AverageScalars& s) : pull(splat<V>(s.pull)), from_old(s.from_old) {}
  V operator()(V old, V x) const { return fma(pull, x - old, from_old ? old : x); }
};

// The state that data[kState] is, of S in memory.
template <class S, int kState> class State {
 public:
  State(const StepArrays& a, const StepScalars& s)
      : p_(static_cast<S*>(a.data[kState])), stochastic_(kState == kSecond && s.stochastic), noise_(s.noise) {}
  explicit operator bool() const { return p_ != nullptr; }
  vec_t<S> load(int64_t i, int count) const { return load_count(p_ + i, count); }
  void store(int64_t first, int64_t i, vec_t<S> x, int count) const {
    store_rounded(p_ + i, x, stochastic_, first + i, noise_, count);
  }

 private:
  S* const p_;
  const bool stochastic_;
  const uint32_t noise_;
};

// One block of 8 bits, as in fastlm/_eight_bit.py: codes to read and, until all are known, floats that were stored.
template <int kState> class State<uint8_t, kState> {
  static constexpr bool kSigned = kState == kFirst;
  static constexpr int kOne = kSigned ? kFirstSigned : kFirstUnsigned;

 public:
  State(const StepArrays& a, const StepScalars& s)
      : codes_(static_cast<uint8_t*>(a.data[kState])), scale_(a.scales[kState - kFirst]),
        numbers_(a.numbers[kState - kFirst]), scales_(splat<f32v>(*scale_)), noise_(kSigned ? s.noise_of_mean : s.noise) {}
  f32v load(int64_t i, int count) const {
    u32v code = load_bytes_count(codes_ + i, count), size = kSigned ? code & 127u : code;
    u32v bits = (size + uint32_t(kOne)) << kStateCut;
    if (kSigned) bits |= (code & 128u) << 24;
    return (f32v)(size != 0u ? bits : u32v{}) * scales_;
  }
  void store(int64_t, int64_t i, f32v x, int count) {
    x = first_of(x, count);
    FASTLM_ISA::store(numbers_ + i, x);
    sizes_ = max(sizes_, (i32v)abs(x));
  }
  // After the last store: the scale, and then the codes of n numbers.
  float find_scale() {
    int32_t bits = 0;
    for (int i = 0; i < kLanes; ++i) bits = sizes_[i] > bits ? sizes_[i] : bits;
    float largest;
    std::memcpy(&largest, &bits, sizeof largest);
    if (bits >= 0x7f800000) {  // of what is not finite, signs are left
      for (int i = 0; i < kStateBlock; ++i) numbers_[i] = std::signbit(numbers_[i]) ? -0.0f : 0.0f;
      largest = NAN;
    } else if (largest < kLeastScale) {
      largest = 0;
    }
    return *scale_ = largest;
  }
  void pack(float scale, int64_t first, int64_t n) const {
    const float inverse = scale > 0 ? 1 / scale : 0;
    if (n == kStateBlock) return pack_block(numbers_, inverse, random_at(first, noise_), codes_);
    uint8_t codes[kStateBlock];
    pack_block(numbers_, inverse, random_at(first, noise_), codes);
    std::memcpy(codes_, codes, n);
  }

 private:
  static void pack_block(const float* numbers, float inverse_, u32v at, uint8_t* codes) {
    const f32v inverse = splat<f32v>(inverse_);
    for (int i = 0; i < kStateBlock; i += 4 * kLanes) {
      f32v number[4];
      i32v part[4], code[4];  // as bits; no code is above 127 or 255, since no part exceeds 1 by more than some last bits
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k, at += kLanes * kRandomStep) {
        number[k] = FASTLM_ISA::load(numbers + i + k * kLanes);
        part[k] = (i32v)(abs(number[k]) * inverse);
        code[k] = (i32v)(((u32v)part[k] + (random_bits(at) << (kStateCut - 16))) >> kStateCut) - kOne;
      }
      u8v bytes = saturated(code);
      if (kSigned) {
        bytes |= signs(number);
      } else {  // what is above 0 stays so
        bytes = max(bytes, min(saturated(part), 1 + u8v{}));
      }
      std::memcpy(codes + i, &bytes, sizeof bytes);
    }
  }

  uint8_t* const codes_;
  float *const scale_, *const numbers_;
  const f32v scales_;
  const uint32_t noise_;
  i32v sizes_{};  // the largest so far: as bits, which are in the order of sizes and of which those of NaN are the largest
};

// The rules: new parameters of old ones and gradients, and the states of these. No sum of two plain products: see fma in
// vec.h. kMore: with anything that only some steps have.
template <class T, class S, bool kMore> struct Adam {
  using V = vec_t<T>;
  State<S, kFirst> m;
  State<S, kSecond> v;
  S* const top;
  const Average<V> average;
  const V beta2, rest2, decay, step_size, correction, eps;
  Adam(const StepArrays& a, const StepScalars& s)
      : m(a, s), v(a, s), top(static_cast<S*>(a.data[kTop])), average(s.mean), beta2(splat<V>(s.beta2)),
        rest2(splat<V>(1 - s.beta2)), decay(splat<V>(s.decay)), step_size(splat<V>(s.step_size)),
        correction(splat<V>(s.correction)), eps(splat<V>(s.eps)) {}
  V operator()(V p, V g, int64_t first, int64_t i, int count) {
    V mean = average(m.load(i, count), g);
    V second = fma(v.load(i, count), beta2, g * g * rest2);
    m.store(first, i, mean, count);
    v.store(first, i, second, count);
    if constexpr (kMore && !std::is_same_v<S, uint8_t>) {
      if (top != nullptr) {
        second = maximum(load_count(top + i, count), second);
        store_count(top + i, second, count);
      }
    }
    V denominator = fma(sqrt(second), correction, eps);
    return p * decay - step_size * mean / denominator;
  }
  void finish(int64_t first, int64_t n) {
    if constexpr (std::is_same_v<S, uint8_t>) {
      const float scale_of_m = m.find_scale(), scale_of_v = v.find_scale();
      m.pack(scale_of_m, first, n);
      v.pack(scale_of_v, first, n);
    }
  }
};
template <class T, class S, bool kMore> struct Sgd {
  using V = vec_t<T>;
  const State<S, kFirst> buffer;
  const V momentum, rest, minus_lr;
  const bool starts, nesterov;
  Sgd(const StepArrays& a, const StepScalars& s)
      : buffer(a, s), momentum(splat<V>(s.momentum)), rest(splat<V>(s.rest)), minus_lr(splat<V>(-s.step_size)),
        starts(s.starts), nesterov(s.nesterov) {}
  V operator()(V p, V g, int64_t first, int64_t i, int count) const {
    if (buffer) {
      V average = starts ? g : fma(buffer.load(i, count), momentum, g * rest);
      buffer.store(first, i, average, count);
      g = nesterov ? fma(average, momentum, g) : average;
    }
    return fma(g, minus_lr, p);
  }
  void finish(int64_t, int64_t) const {}
};

template <template <class, class, bool> class Rule, class T, class S, bool kMore>
void step_of(const StepArrays& a, int64_t first, int64_t n, const StepScalars& s) {
  using V = vec_t<T>;
  using Wide = compute_t<T>;
  // Outside the loop, since the compiler must think that a store may change what s refers to.
  Rule<T, S, kMore> rule(a, s);
  const Average<V> average(s.ema);
  T* const param = static_cast<T*>(a.data[kParam]);
  const T* const grad = static_cast<const T*>(a.data[kGrad]);
  Wide *const master = static_cast<Wide*>(a.data[kMaster]), *const ema = static_cast<Wide*>(a.data[kEma]);
  const bool has_l2 = s.has_l2, has_l1 = s.has_l1, stochastic = s.stochastic_params;
  const V sign = splat<V>(s.sign), l2 = splat<V>(s.l2), l1 = splat<V>(s.l1);
  const uint32_t noise = s.noise_of_param;
  for_each_vector<V>(n, [&](int64_t i, int count) {
    V p = kMore && master != nullptr ? load_count(master + i, count) : load_count(param + i, count);
    V g = load_count(grad + i, count) * sign;
    if (has_l2) g = fma(p, l2, g);  // not 0 * p, which is NaN where p is infinite
    if (kMore && has_l1) g = g + (p > V{} ? l1 : p < V{} ? -l1 : V{});
    p = rule(p, g, first, i, count);
    store_rounded(param + i, p, stochastic, first + i, noise, count);
    if (kMore && master != nullptr) store_count(master + i, p, count);
    if (kMore && ema != nullptr) store_count(ema + i, average(load_count(ema + i, count), p), count);
  });
  rule.finish(first, n);
}
template <template <class, class, bool> class Rule, class T, class S>
void step(const StepArrays& a, int64_t first, int64_t n, const StepScalars& s) {
  bool more = a.data[kTop] != nullptr || a.data[kMaster] != nullptr || a.data[kEma] != nullptr || s.has_l1;
  (more ? step_of<Rule, T, S, true> : step_of<Rule, T, S, false>)(a, first, n, s);
}

template <class T> inline void* from(void* p, int64_t i) { return p != nullptr ? static_cast<T*>(p) + i : nullptr; }
template <class T> void adam_in_8_bits(const StepArrays& a, int64_t first, int64_t n, const StepScalars& s) {
  using Wide = compute_t<T>;
  alignas(64) float numbers[2][kStateBlock] = {};
  for (int64_t i = 0; i < n; i += kStateBlock) {
    StepArrays block = {{from<T>(a.data[kParam], i), from<T>(a.data[kGrad], i), from<uint8_t>(a.data[kFirst], i),
                         from<uint8_t>(a.data[kSecond], i), nullptr, from<Wide>(a.data[kMaster], i),
                         from<Wide>(a.data[kEma], i)},
                        {a.scales[0] + i / kStateBlock, a.scales[1] + i / kStateBlock},
                        {numbers[0], numbers[1]}};
    step<Adam, T, uint8_t>(block, first + i, n - i < kStateBlock ? n - i : kStateBlock, s);
  }
}

template <class T> double sum_of_squares(const void* x_, int64_t n) {
  const T* x = static_cast<const T*>(x_);
  return sums_over<1, vec_t<T>>(n, [&](int64_t i, int count, vec_t<T>(&out)[1]) {
           vec_t<T> v = load_count(x + i, count);
           out[0] = v * v;
         }).of[0];
}

#if FASTLM_VECTOR_BYTES == 16
#define FASTLM_DOUBLE_STEP(rule) {nullptr, nullptr, nullptr, step<rule, double, double>}
#else
#define FASTLM_DOUBLE_STEP(rule) {}
#endif
constexpr OptimizerKernels kOptimizerKernels = {
    {{{step<Adam, float, float>, step<Adam, float, bf16>, nullptr, nullptr, nullptr, adam_in_8_bits<float>},
      {step<Adam, bf16, float>, step<Adam, bf16, bf16>, nullptr, nullptr, nullptr, adam_in_8_bits<bf16>},
      {step<Adam, f16, float>, nullptr, step<Adam, f16, f16>, nullptr, nullptr, adam_in_8_bits<f16>},
      FASTLM_DOUBLE_STEP(Adam)},
     {{step<Sgd, float, float>, step<Sgd, float, bf16>},
      {step<Sgd, bf16, float>, step<Sgd, bf16, bf16>},
      {step<Sgd, f16, float>, nullptr, step<Sgd, f16, f16>},
      FASTLM_DOUBLE_STEP(Sgd)}},
    FASTLM_FOR_FLOATS(sum_of_squares)};
#undef FASTLM_DOUBLE_STEP

}  // namespace
}  // namespace fastlm::cpu::FASTLM_ISA
