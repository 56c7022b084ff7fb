// One step of Adam, AdamW or SGD: one pass over memory, in Adam 7 words a parameter (reads p, g, m, v; writes p, m, v).
#include <cstdint>

#include "optimizer.h"
#include "sums-inl.h"
#include "vec.h"

namespace fastlm::cpu::FASTLM_ISA {
namespace {

// adam_random of a vector of elements: what is scrambled for those from i on, and the random numbers.
constexpr uint32_t kRandomStep = 0x9e3779b9u;
inline u32v random_at(int64_t i, uint32_t noise) {
  const u32v lanes = (u32v)lane_numbers<i32v>() * kRandomStep;
  return lanes + (static_cast<uint32_t>(i) * kRandomStep + noise + static_cast<uint32_t>(i >> 32));
}
inline u32v random_words(u32v at) { return (at ^ (at >> 15)) * 0x846ca68bu; }
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
    if (stochastic) return store_at_random(p, x, random_words(random_at(i, noise)) >> 16, count);
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
  State(const StepArrays& a, const StepScalars& s, float*)
      : p_(static_cast<S*>(a.data[kState])), stochastic_(kState == kSecond && s.stochastic), noise_(s.noise) {}
  explicit operator bool() const { return p_ != nullptr; }
  void start(int64_t) {}
  vec_t<S> load(int64_t i, int count) const { return load_count(p_ + i, count); }
  void store(int64_t first, int64_t i, vec_t<S> x, int count) const {
    store_rounded(p_ + i, x, stochastic_, first + i, noise_, count);
  }

 private:
  S* const p_;
  const bool stochastic_;
  const uint32_t noise_;
};

// A constant that the compiler does not know: one that it knows it makes anew in each turn of a loop that lacks registers,
// by the instructions that packing waits for already.
template <class V> inline V opaque(V v) {
  asm("" : "+m"(v));
  return v;
}

struct PackConstants {
  __attribute__((always_inline)) PackConstants() {}
  const u32v step = opaque(u32v{} + kLanes * kRandomStep), of_mean = opaque(u32v{} + kRandomOfMean);
  const u16v size = opaque(u16v{} + 0x7ff), sign = opaque(u16v{} + 128), least = opaque(u16v{} + 1);
  const u16v signed_one = opaque(u16v{} + kFirstSigned), unsigned_one = opaque(u16v{} + kFirstUnsigned);
};

// Blocks of 8 bits, as in fastlm/_eight_bit.py: codes to read and, until all of a block are known, floats that were stored.
template <int kState> class State<uint8_t, kState> {
  static constexpr bool kSigned = kState == kFirst;
  static constexpr int kOne = kSigned ? kFirstSigned : kFirstUnsigned;

 public:
  State(const StepArrays& a, const StepScalars&, float* numbers)
      : codes_(static_cast<uint8_t*>(a.data[kState])), scales_(a.scales[kState - kFirst]), numbers_(numbers) {}
  void start(int64_t begin) {  // of a block
    begin_ = begin;
    scale_ = splat<f32v>(scales_[begin / kStateBlock]);
    sizes_ = u32v{};
  }
  __attribute__((always_inline)) f32v load(int64_t i, int count) const {
    u32v bits = load_bytes_count<kSigned>(codes_ + i, count) << kStateCut;
    if (kSigned) bits &= 0x80000000u | 127u << kStateCut;
    u32v size = kSigned ? bits + bits : bits;  // 0 where that of the code is
    return (f32v)(size != 0u ? bits + (uint32_t(kOne) << kStateCut) : u32v{}) * scale_;
  }
  __attribute__((always_inline)) void store(int64_t, int64_t i, f32v x, int count) {
    x = first_of(x, count);
    FASTLM_ISA::store(numbers_ + (i - begin_), x);
    sizes_ = max(sizes_, (u32v)(kSigned ? abs(x) : x));  // squares are not below 0, but may be NaN with a sign
  }
  // After the block's last store: its scale, and then 4 kLanes codes at a time of n, by random words.
  __attribute__((always_inline)) void find_scale() {
    uint32_t bits = 0;
    for (int i = 0; i < kLanes; ++i) bits = sizes_[i] > bits ? sizes_[i] : bits;
    float largest;
    std::memcpy(&largest, &bits, sizeof largest);
    if (bits >= 0x7f800000u) {  // of what is not finite, signs are left
      for (int i = 0; i < kStateBlock; ++i) numbers_[i] = kSigned && std::signbit(numbers_[i]) ? -0.0f : 0.0f;
      largest = NAN;
    } else if (largest < kLeastScale) {
      largest = 0;
    }
    scales_[begin_ / kStateBlock] = largest;
    inverse_ = splat<f32v>(largest > 0 ? 1 / largest : 0);
  }
  __attribute__((always_inline)) void pack(int64_t i, int64_t n, const u32v (&random)[4], const PackConstants& c) const {
    u32v bits[4];
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      u32v part = (u32v)(FASTLM_ISA::load(numbers_ + i + k * kLanes) * inverse_);
      bits[k] = (part + (kSigned ? random[k] & c.of_mean : random[k] >> (32 - kStateCut))) >> kStateCut;
    }
    // A part exceeds 1 by two last bits at most, with which kRandomOfMean does not reach code 128; 256 becomes 255.
    u16v code[2];
#pragma GCC unroll 2
    for (int k = 0; k < 2; ++k) {
      u16v x = narrow_pair(bits[2 * k], bits[2 * k + 1]);
      code[k] = kSigned ? minus_saturated(x & c.size, c.signed_one) | ((x >> 4) & c.sign)
                        : max(minus_saturated(x, c.unsigned_one), min(x, c.least));  // what is not negligible stays above 0
    }
    u8v bytes = bytes_of(code[0], code[1]);
    if (n - i >= 4 * kLanes) {
      std::memcpy(codes_ + begin_ + i, &bytes, sizeof bytes);
    } else {
      const u8v last = bytes;  // the address of `bytes` would keep it in memory
      std::memcpy(codes_ + begin_ + i, &last, n - i);
    }
  }

 private:
  uint8_t* const codes_;
  float *const scales_, *const numbers_;
  int64_t begin_ = 0;
  f32v scale_{}, inverse_{};
  u32v sizes_{};  // the largest so far: as bits, which are in the order of sizes and of which those of NaN are the largest
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
  const uint32_t noise;
  Adam(const StepArrays& a, const StepScalars& s, float* numbers)
      : m(a, s, numbers), v(a, s, numbers + kStateBlock), top(static_cast<S*>(a.data[kTop])), average(s.mean),
        beta2(splat<V>(s.beta2)), rest2(splat<V>(1 - s.beta2)), decay(splat<V>(s.decay)), step_size(splat<V>(s.step_size)),
        correction(splat<V>(s.correction)), eps(splat<V>(s.eps)), noise(s.noise) {}
  void start(int64_t begin) {
    m.start(begin);
    v.start(begin);
  }
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
  void finish(int64_t first, int64_t n, const PackConstants& constants) {
    if constexpr (std::is_same_v<S, uint8_t>) {
      m.find_scale();
      v.find_scale();
      u32v at = random_at(first, noise), random[4];
      for (int64_t i = 0; i < n; i += 4 * kLanes) {
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k, at += constants.step) random[k] = random_words(at);
        m.pack(i, n, random, constants);
        v.pack(i, n, random, constants);
      }
    }
  }
};
template <class T, class S, bool kMore> struct Sgd {
  using V = vec_t<T>;
  const State<S, kFirst> buffer;
  const V momentum, rest, minus_lr;
  const bool starts, nesterov;
  Sgd(const StepArrays& a, const StepScalars& s, float* numbers)
      : buffer(a, s, numbers), momentum(splat<V>(s.momentum)), rest(splat<V>(s.rest)), minus_lr(splat<V>(-s.step_size)),
        starts(s.starts), nesterov(s.nesterov) {}
  void start(int64_t) const {}
  V operator()(V p, V g, int64_t first, int64_t i, int count) const {
    if (buffer) {
      V average = starts ? g : fma(buffer.load(i, count), momentum, g * rest);
      buffer.store(first, i, average, count);
      g = nesterov ? fma(average, momentum, g) : average;
    }
    return fma(g, minus_lr, p);
  }
  void finish(int64_t, int64_t, const PackConstants&) const {}
};

template <template <class, class, bool> class Rule, class T, class S, bool kMore>
void step_of(const StepArrays& a, int64_t first, int64_t n, const StepScalars& s) {
  using V = vec_t<T>;
  using Wide = compute_t<T>;
  // Outside the loop, since the compiler must think that a store may change what s refers to.
  alignas(64) float numbers[2 * kStateBlock] = {};  // not within the rule, whose other members would then be in memory too
  Rule<T, S, kMore> rule(a, s, numbers);
  const PackConstants constants;
  const Average<V> average(s.ema);
  T* const param = static_cast<T*>(a.data[kParam]);
  const T* const grad = static_cast<const T*>(a.data[kGrad]);
  Wide *const master = static_cast<Wide*>(a.data[kMaster]), *const ema = static_cast<Wide*>(a.data[kEma]);
  const bool has_l2 = s.has_l2, has_l1 = s.has_l1, stochastic = s.stochastic_params;
  const V sign = splat<V>(s.sign), l2 = splat<V>(s.l2), l1 = splat<V>(s.l1);
  const uint32_t noise = s.noise_of_param;
  const int64_t block = std::is_same_v<S, uint8_t> ? kStateBlock : n;
  for (int64_t begin = 0; begin < n; begin += block) {
    const int64_t in_block = n - begin < block ? n - begin : block;
    rule.start(begin);
    for_each_vector<V>(in_block, [&](int64_t j, int count) {
      const int64_t i = begin + j;
      V p = kMore && master != nullptr ? load_count(master + i, count) : load_count(param + i, count);
      V g = load_count(grad + i, count) * sign;
      if (has_l2) g = fma(p, l2, g);  // not 0 * p, which is NaN where p is infinite
      if (kMore && has_l1) g = g + (p > V{} ? l1 : p < V{} ? -l1 : V{});
      p = rule(p, g, first, i, count);
      store_rounded(param + i, p, stochastic, first + i, noise, count);
      if (kMore && master != nullptr) store_count(master + i, p, count);
      if (kMore && ema != nullptr) store_count(ema + i, average(load_count(ema + i, count), p), count);
    });
    rule.finish(first + begin, in_block, constants);
  }
}
template <template <class, class, bool> class Rule, class T, class S>
void step(const StepArrays& a, int64_t first, int64_t n, const StepScalars& s) {
  bool more = a.data[kTop] != nullptr || a.data[kMaster] != nullptr || a.data[kEma] != nullptr || s.has_l1;
  (more ? step_of<Rule, T, S, true> : step_of<Rule, T, S, false>)(a, first, n, s);
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
    {{{step<Adam, float, float>, step<Adam, float, bf16>, nullptr, nullptr, nullptr, step<Adam, float, uint8_t>},
      {step<Adam, bf16, float>, step<Adam, bf16, bf16>, nullptr, nullptr, nullptr, step<Adam, bf16, uint8_t>},
      {step<Adam, f16, float>, nullptr, step<Adam, f16, f16>, nullptr, nullptr, step<Adam, f16, uint8_t>},
      FASTLM_DOUBLE_STEP(Adam)},
     {{step<Sgd, float, float>, step<Sgd, float, bf16>},
      {step<Sgd, bf16, float>, step<Sgd, bf16, bf16>},
      {step<Sgd, f16, float>, nullptr, step<Sgd, f16, f16>},
      FASTLM_DOUBLE_STEP(Sgd)}},
    FASTLM_FOR_FLOATS(sum_of_squares)};
#undef FASTLM_DOUBLE_STEP

}  // namespace
}  // namespace fastlm::cpu::FASTLM_ISA
