// One step of an optimizer, in one pass over memory, in place on any strides. Adam and AdamW take 7 words a parameter (read
// p, g, m, v; write p, m, v), SGD 3 and with momentum 5. 16-bit tensors are computed in float and rounded when stored. And
// the norm of gradients, one pass more.
#include "optimizer.h"

#include <cmath>
#include <type_traits>

#include "common.cuh"

namespace fastlm::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kVectorsPerThread = 4;
// What a kernel's arguments may take. Since CUDA 12.1 it is 32,764 bytes, which needs a driver as new: that of CUDA 13 is.
#if __CUDACC_VER_MAJOR__ >= 13
constexpr int kArgumentBytes = 32764;
#else
constexpr int kArgumentBytes = 4096;
#endif

// The same for all parameters of a step. Rounded once, from double.
template <class C> struct Scalars {
  DeviceScalar scale, found_inf;
  DeviceScalar lr;  // of SGD that counts no steps
  C sign;           // -1 to maximize, else 1
  C l2, l1;         // weight decay that is added to the gradient
  C weight;         // 1 - beta1, of the new gradient
  C beta2, one_minus_beta2;
  C eps;
  C momentum, one_minus_dampening;
  C ema_weight;  // 1 - ema_decay, of the new parameter
  bool nesterov, stochastic, stochastic_params;
};
template <class C> Scalars<C> scalars_of(const StepOptions& o, const StepOnDevice& on_device) {
  return {on_device.scale, on_device.found_inf, on_device.workspace == nullptr ? on_device.lr : DeviceScalar{},
          C(o.maximize ? -1 : 1), C(o.decoupled ? 0 : o.weight_decay), C(o.l1), C(1 - o.beta1), C(o.beta2),
          C(1 - o.beta2), C(o.eps), C(o.momentum), C(1 - o.dampening), C(1 - o.ema_decay), o.nesterov, o.stochastic,
          o.stochastic_params};
}

// What depends on the step of a parameter.
template <class C> struct Step {
  C step_size;   // lr / (1 - beta1^t); SGD's lr
  C correction;  // sqrt(1 - beta2^t); of SGD 0 in the first step, whose average is the gradient
  C decay;       // 1 - lr * weight decay, which scales the parameter
  uint32_t noise;
};
static_assert(sizeof(Step<double>) == kStepWorkspace * sizeof(double));

FASTLM_HOST_DEVICE inline Step<double> step_at(double t, double lr, uint32_t place, const StepOptions& o) {
  uint32_t noise = adam_noise(t, place, o.seed);
  if (o.rule == StepRule::kSgd) return {lr, t == 1 ? 0.0 : 1.0, 1.0, noise};
  return {lr / (1 - pow(o.beta1, t)), sqrt(1 - pow(o.beta2, t)), o.decoupled ? 1 - lr * o.weight_decay : 1.0, noise};
}
template <class C> FASTLM_HOST_DEVICE inline Step<C> rounded(const Step<double>& s) {
  return {C(s.step_size), C(s.correction), C(s.decay), s.noise};
}

template <class C, int kTensors> struct Entry {
  void* data[kTensors];
  int64_t n;
  Step<C> step;
  int place;  // in the list of all parameters
  int first_block;
  bool aligned;
  __device__ void* tensor(int t) const { return t < kTensors ? data[t] : nullptr; }
};

template <class C, int kTensors> struct Table {
  using Item = Entry<C, kTensors>;
  Scalars<C> scalars;
  const Step<double>* steps;  // by place, in device memory, or null: then entries have them
  int count;
  static constexpr int kEntries = (kArgumentBytes - sizeof(Scalars<C>) - 2 * sizeof(void*)) / sizeof(Item);
  Item entries[kEntries];
};
// A step has masters, averages of weights, an L1 penalty, or may be skipped: entries take more room then.
template <bool kExtras> constexpr int kTensorsOf = kExtras ? kStepTensors : kMaster;
// Where entries of states in 8 bits have their scales: no such state has a largest square.
constexpr int kFirstScales = kTop, kSecondScales = kStepTensors, kPackedTensors = kStepTensors + 1;
static_assert(sizeof(Table<float, kPackedTensors>) <= kArgumentBytes && sizeof(Table<double, kStepTensors>) <= kArgumentBytes);

template <class C> struct StridedItem {
  Scalars<C> scalars;
  const Step<double>* steps;
  Entry<C, kStepTensors> entry;
  DType dtype, state_dtype;
  int ndim;
  int64_t shape[StepItem::kMaxDims];
  int64_t strides[kStepTensors][StepItem::kMaxDims];
};

// The last that starts at or before this block.
template <class T> __device__ const auto& entry_of_block(const T& table) {
  int low = 0, high = table.count - 1;
  while (low < high) {
    int middle = (low + high + 1) / 2;
    if (table.entries[middle].first_block <= int(blockIdx.x)) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return table.entries[low];
}

__device__ inline double value_of(const DeviceScalar& s) {
  return s.wide ? *static_cast<const double*>(s.data) : *static_cast<const float*>(s.data);
}
__device__ inline bool is_skipped(const DeviceScalar& found_inf) { return found_inf.data != nullptr && value_of(found_inf) != 0; }

template <class Item, class C> __device__ Step<C> step_of(const Step<double>* steps, const Item& entry, const Scalars<C>& s) {
  Step<C> step = steps != nullptr ? rounded<C>(steps[entry.place]) : entry.step;
  if (s.lr.data != nullptr) step.step_size = C(value_of(s.lr));
  return step;
}
template <class C> __device__ C scale_of(const Scalars<C>& s) {
  return s.scale.data != nullptr ? s.sign * C(value_of(s.scale)) : s.sign;
}

// --- steps that lie on the device -------------------------------------------------------------------------------------
struct StepTable {
  static constexpr int kEntries = (kArgumentBytes - sizeof(StepOptions) - 64) / sizeof(DeviceScalar);
  StepOptions options;
  DeviceScalar lr, found_inf;
  Step<double>* steps;
  int count, first_place;
  DeviceScalar entries[kEntries];
};
static_assert(sizeof(StepTable) <= kArgumentBytes);

// Counts this step, and leaves what follows from it where the step's kernels look: a parameter a thread.
__global__ void __launch_bounds__(kThreads) count_steps_kernel(const __grid_constant__ StepTable table) {
  int i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= table.count || is_skipped(table.found_inf)) return;
  const DeviceScalar& step = table.entries[i];
  double t = value_of(step) + 1, lr = table.lr.data != nullptr ? value_of(table.lr) : table.options.lr;
  if (step.wide) {
    *static_cast<double*>(step.data) = t;
  } else {
    *static_cast<float*>(step.data) = static_cast<float>(t);
  }
  int place = table.first_place + i;
  table.steps[place] = step_at(t, lr, place, table.options);
}

// --- the rules --------------------------------------------------------------------------------------------------------
// Each sum of a product is an fma, so that all kernels round alike whatever the compiler makes of the code around.
template <class C> __device__ C lerp(C from, C to, C weight) {
  // from the nearer end: weight 1 gives `to` however large `from` is
  return weight < C(0.5) ? fma(weight, to - from, from) : fma(weight - 1, to - from, to);
}

template <bool kExtras, class C> __device__ C gradient(C g, C p, C scale, const Scalars<C>& s) {
  g = fma(g, scale, C(0));
  if (s.l2 != 0) g = fma(s.l2, p, g);  // not 0 * p, which is NaN where p is infinite
  if (kExtras && s.l1 != 0) g = fma(s.l1, C((p > 0) - (p < 0)), g);
  return g;
}

struct Adam {
  static constexpr const char* kOp = "adam_";
  static constexpr bool kSquares = true;
  // `top` is the running maximum, looked at only with amsgrad.
  template <class C>
  static __device__ void update(C& p, C g, C& m, C& v, C& top, bool amsgrad, const Step<C>& step, const Scalars<C>& s) {
    m = lerp(m, g, s.weight);
    v = fma(s.beta2, v, s.one_minus_beta2 * g * g);
    C second = v;
    if (amsgrad) {
      top = top > v || top != top ? top : v;  // NaN in either stays NaN
      second = top;
    }
    p = fma(p, step.decay, -step.step_size * (m / (sqrt(second) / step.correction + s.eps)));
  }
};

struct Sgd {
  static constexpr const char* kOp = "sgd_";
  static constexpr bool kSquares = false;
  template <class C>
  static __device__ void update(C& p, C g, C& m, C&, C&, bool, const Step<C>& step, const Scalars<C>& s) {
    if (s.momentum != 0) {
      m = step.correction == 0 ? g : fma(s.momentum, m, s.one_minus_dampening * g);
      g = s.nesterov ? fma(s.momentum, m, g) : m;
    }
    p = fma(-step.step_size, g, p);
  }
};

// --- elements ---------------------------------------------------------------------------------------------------------
// Up with the probability of the part that is cut off; inf and NaN as they are.
__device__ inline bf16 narrow_at_random(float x, int64_t i, uint32_t noise) {
  uint32_t bits = bits_of(x);
  if ((bits & 0x7f800000u) == 0x7f800000u) return narrow<bf16>(x);
  uint16_t high = static_cast<uint16_t>((bits + (adam_random(i, noise) >> 16)) >> 16);
  bf16 result;
  memcpy(&result, &high, 2);
  return result;
}
template <class T, class C> __device__ T stored(C x, bool stochastic, int64_t i, uint32_t noise) {
  if constexpr (std::is_same_v<T, bf16>) {
    if (stochastic) return narrow_at_random(x, i, noise);
  }
  return narrow<T>(x);
}

// kCount elements of one thread, in as many 16-byte accesses as that takes.
template <class T, int kCount> struct Elements {
  Vector<T> parts[kCount / kVector<T>];
  __device__ T& operator[](int i) { return parts[i / kVector<T>].at[i % kVector<T>]; }
  __device__ void load(const void* from, int64_t i, int64_t count, bool aligned) {
#pragma unroll
    for (int k = 0; k < kCount / kVector<T>; ++k) {
      parts[k] = load_count(static_cast<const T*>(from) + i + k * kVector<T>, count - k * kVector<T>, aligned);
    }
  }
  __device__ void store(void* to, int64_t i, int64_t count, bool aligned) const {
#pragma unroll
    for (int k = 0; k < kCount / kVector<T>; ++k) {
      store_count(static_cast<T*>(to) + i + k * kVector<T>, parts[k], count - k * kVector<T>, aligned);
    }
  }
};

// The parameters of one thread, what they are computed in, and their averages.
template <class T, int kCount> struct Parameters {
  using C = compute_t<T>;
  Elements<T, kCount> p;
  Elements<C, kCount> wide, ema;  // with a master and with an average alone
  template <class Item> __device__ static void* master(const Item& entry) {
    return sizeof(T) == 2 ? entry.tensor(kMaster) : nullptr;  // so that other kernels keep no registers for it
  }
  template <class Item> __device__ void load(const Item& entry, int64_t i, int64_t count) {
    if (master(entry) == nullptr) {
      p.load(entry.data[kParam], i, count, entry.aligned);
    } else {
      wide.load(master(entry), i, count, entry.aligned);
    }
    if (entry.tensor(kEma) != nullptr) ema.load(entry.tensor(kEma), i, count, entry.aligned);
  }
  template <class Item> __device__ C at(const Item& entry, int e) {
    return master(entry) != nullptr ? wide[e] : C(widen(p[e]));
  }
  template <class Item>
  __device__ void set(const Item& entry, int e, C x, int64_t i, uint32_t noise, const Scalars<C>& scalars) {
    p[e] = stored<T>(x, scalars.stochastic_params, i, noise);
    if (master(entry) != nullptr) wide[e] = x;
    if (entry.tensor(kEma) != nullptr) ema[e] = lerp(ema[e], x, scalars.ema_weight);
  }
  template <class Item> __device__ void store(const Item& entry, int64_t i, int64_t count) const {
    p.store(entry.data[kParam], i, count, entry.aligned);
    if (master(entry) != nullptr) wide.store(master(entry), i, count, entry.aligned);
    if (entry.tensor(kEma) != nullptr) ema.store(entry.tensor(kEma), i, count, entry.aligned);
  }
};

// --- the step ---------------------------------------------------------------------------------------------------------
template <class T, class S> constexpr int kStepWidth = kVector<T> > kVector<S> ? kVector<T> : kVector<S>;

// Parameters and gradients of T, states of S.
template <class Rule, class T, class S, bool kExtras>
__global__ void __launch_bounds__(kThreads)
    step_kernel(const __grid_constant__ Table<compute_t<T>, kTensorsOf<kExtras>> table) {
  using C = compute_t<T>;
  constexpr int kWidth = kStepWidth<T, S>;
  const auto& entry = entry_of_block(table);
  const Scalars<C>& scalars = table.scalars;
  if (kExtras && is_skipped(scalars.found_inf)) return;
  const Step<C> step = step_of(table.steps, entry, scalars);
  const C scale = scale_of(scalars);
  const uint32_t noise_of_param = adam_noise_of_param(step.noise);
  const bool averages = Rule::kSquares || entry.data[kFirst] != nullptr;
  const bool amsgrad = Rule::kSquares && entry.data[kTop] != nullptr, aligned = entry.aligned;
  int64_t first = (int64_t(blockIdx.x - entry.first_block) * kVectorsPerThread * kThreads + threadIdx.x) * kWidth;
#pragma unroll 1
  for (int u = 0; u < kVectorsPerThread; ++u) {
    int64_t i = first + int64_t(u) * kThreads * kWidth, count = entry.n - i;
    if (count <= 0) return;
    Parameters<T, kWidth> p;
    Elements<T, kWidth> g;
    Elements<S, kWidth> m{}, v{}, top;
    p.load(entry, i, count);
    g.load(entry.data[kGrad], i, count, aligned);
    if (averages) m.load(entry.data[kFirst], i, count, aligned);
    if (Rule::kSquares) v.load(entry.data[kSecond], i, count, aligned);
    if (amsgrad) {
      top.load(entry.data[kTop], i, count, aligned);
    } else {
      top = v;
    }
#pragma unroll
    for (int e = 0; e < kWidth; ++e) {
      C pe = p.at(entry, e), me = widen(m[e]), ve = widen(v[e]), te = widen(top[e]);
      Rule::update(pe, gradient<kExtras, C>(widen(g[e]), pe, scale, scalars), me, ve, te, amsgrad, step, scalars);
      p.set(entry, e, pe, i + e, noise_of_param, scalars);
      m[e] = narrow<S>(me);
      v[e] = stored<S>(ve, scalars.stochastic, i + e, step.noise);
      top[e] = narrow<S>(te);
    }
    p.store(entry, i, count);
    if (averages) m.store(entry.data[kFirst], i, count, aligned);
    if (Rule::kSquares) v.store(entry.data[kSecond], i, count, aligned);
    if (amsgrad) top.store(entry.data[kTop], i, count, aligned);
  }
}

// --- states in 8 bits -------------------------------------------------------------------------------------------------
constexpr int kLaneWidth = kStateBlock / kWarp;
static_assert(kLaneWidth == 8, "the codes of a lane are one access");
constexpr int kBlocksPerWarp = 2, kWarps = kThreads / kWarp;

// The codes of one lane, the first in the lowest byte.
__device__ inline uint64_t load_codes(const void* codes, int64_t i, int64_t count, bool aligned) {
  const uint8_t* from = static_cast<const uint8_t*>(codes) + i;
  if (aligned && count >= kLaneWidth) return *reinterpret_cast<const uint64_t*>(from);
  uint64_t word = 0;
#pragma unroll
  for (int e = 0; e < kLaneWidth; ++e) {
    if (e < count) word |= uint64_t(from[e]) << 8 * e;
  }
  return word;
}
__device__ inline void store_codes(void* codes, int64_t i, uint64_t word, int64_t count, bool aligned) {
  uint8_t* to = static_cast<uint8_t*>(codes) + i;
  if (aligned && count >= kLaneWidth) {
    *reinterpret_cast<uint64_t*>(to) = word;
    return;
  }
#pragma unroll
  for (int e = 0; e < kLaneWidth; ++e) {
    if (e < count) to[e] = static_cast<uint8_t>(word >> 8 * e);
  }
}

template <bool kSigned> constexpr int kFirstCode = kSigned ? kFirstSigned : kFirstUnsigned;
template <bool kSigned> constexpr int kLastCode = kSigned ? 127 : 255;

template <bool kSigned> __device__ float unpacked(uint32_t code, float scale) {
  uint32_t steps = code & kLastCode<kSigned>, bits = steps > 0 ? (steps + kFirstCode<kSigned>) << kStateCut : 0;
  return float_of(kSigned ? bits | (code & 128) << 24 : bits) * scale;
}
template <bool kSigned> __device__ uint32_t packed(float x, float inverse, uint32_t random) {
  constexpr int kLeast = kSigned ? 0 : 1;  // what is not negligible stays above 0
  int bits = int((bits_of(fabs(x) * inverse) + random) >> kStateCut), code = bits - kFirstCode<kSigned>;
  code = code < kLeast ? kLeast : code > kLastCode<kSigned> ? kLastCode<kSigned> : code;
  if (bits == 0 || inverse == 0) code = 0;
  return kSigned ? code | (bits_of(x) >> 31) << 7 : code;
}

// Of a block, from the bits of its largest size: as integers they are in order, NaN the largest.
struct BlockScale {
  float scale, inverse;
};
__device__ inline BlockScale scale_of_block(uint32_t largest) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    uint32_t other = shuffle_xor(largest, mask);
    largest = other > largest ? other : largest;
  }
  if (largest >= 0x7f800000u) return {float_of(0x7fc00000u), 0};
  float scale = float_of(largest);
  return scale < kLeastScale ? BlockScale{0, 0} : BlockScale{scale, 1 / scale};
}

// A warp takes a block of a state at a time: what was computed waits in registers for the largest of it. Two blocks of threads
// a multiprocessor are asked for, lest the compiler spills to fit three or four.
template <class T>
__global__ void __launch_bounds__(kThreads, 2) adam_8bit_kernel(const __grid_constant__ Table<float, kPackedTensors> table) {
  const auto& entry = entry_of_block(table);
  const Scalars<float>& scalars = table.scalars;
  if (is_skipped(scalars.found_inf)) return;
  const Step<float> step = step_of(table.steps, entry, scalars);
  const float scale = scale_of(scalars);
  const uint32_t noise_of_param = adam_noise_of_param(step.noise);
  float *m_scales = static_cast<float*>(entry.data[kFirstScales]), *v_scales = static_cast<float*>(entry.data[kSecondScales]);
  const int lane = threadIdx.x % kWarp;
#pragma unroll 1
  for (int u = 0; u < kBlocksPerWarp; ++u) {
    int64_t block = (int64_t(blockIdx.x - entry.first_block) * kBlocksPerWarp + u) * kWarps + threadIdx.x / kWarp;
    if (block * kStateBlock >= entry.n) return;
    int64_t i = block * kStateBlock + lane * kLaneWidth, count = entry.n - i;  // past the end zeros, the largest of nothing
    Parameters<T, kLaneWidth> p;
    Elements<T, kLaneWidth> g;
    p.load(entry, i, count);
    g.load(entry.data[kGrad], i, count, entry.aligned);
    uint64_t m_codes = load_codes(entry.data[kFirst], i, count, entry.aligned);
    uint64_t v_codes = load_codes(entry.data[kSecond], i, count, entry.aligned);
    float m_scale = m_scales[block], v_scale = v_scales[block], m[kLaneWidth], v[kLaneWidth];
    uint32_t m_largest = 0, v_largest = 0;
#pragma unroll
    for (int e = 0; e < kLaneWidth; ++e) {
      float pe = p.at(entry, e), none = 0;
      m[e] = unpacked<true>(m_codes >> 8 * e & 255, m_scale);
      v[e] = unpacked<false>(v_codes >> 8 * e & 255, v_scale);
      Adam::update(pe, gradient<true, float>(widen(g[e]), pe, scale, scalars), m[e], v[e], none, false, step, scalars);
      p.set(entry, e, pe, i + e, noise_of_param, scalars);
      if (e >= count) continue;
      uint32_t m_size = bits_of(fabs(m[e])), v_size = bits_of(fabs(v[e]));
      m_largest = m_size > m_largest ? m_size : m_largest;
      v_largest = v_size > v_largest ? v_size : v_largest;
    }
    p.store(entry, i, count);
    const BlockScale of_m = scale_of_block(m_largest), of_v = scale_of_block(v_largest);
    m_codes = v_codes = 0;
#pragma unroll
    for (int e = 0; e < kLaneWidth; ++e) {
      const uint32_t random = adam_random(i + e, step.noise);
      m_codes |= uint64_t(packed<true>(m[e], of_m.inverse, random & kRandomOfMean)) << 8 * e;
      v_codes |= uint64_t(packed<false>(v[e], of_v.inverse, random >> (32 - kStateCut))) << 8 * e;
    }
    store_codes(entry.data[kFirst], i, m_codes, count, entry.aligned);
    store_codes(entry.data[kSecond], i, v_codes, count, entry.aligned);
    if (lane == 0) m_scales[block] = of_m.scale, v_scales[block] = of_v.scale;
  }
}

// --- any strides ------------------------------------------------------------------------------------------------------
template <class C> __device__ C load_as(DType dtype, const void* from, int64_t i) {
  if constexpr (std::is_same_v<C, double>) return static_cast<const double*>(from)[i];
  if (dtype == DType::kBF16) return widen(static_cast<const bf16*>(from)[i]);
  if (dtype == DType::kF16) return widen(static_cast<const f16*>(from)[i]);
  return static_cast<const float*>(from)[i];
}
// `number` is the element's, from which its random bits follow.
template <class C>
__device__ void store_as(DType dtype, void* to, int64_t i, C x, bool stochastic, int64_t number, uint32_t noise) {
  if constexpr (std::is_same_v<C, double>) {
    static_cast<double*>(to)[i] = x;
  } else if (dtype == DType::kBF16) {
    static_cast<bf16*>(to)[i] = stored<bf16>(x, stochastic, number, noise);
  } else if (dtype == DType::kF16) {
    static_cast<f16*>(to)[i] = narrow<f16>(x);
  } else {
    static_cast<float*>(to)[i] = x;
  }
}

// One element a thread, each tensor by its own strides and in the dtype that it turns out to have.
template <class Rule, class C>
__global__ void __launch_bounds__(kThreads) step_strided_kernel(const __grid_constant__ StridedItem<C> item) {
  const int64_t number = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const Scalars<C>& scalars = item.scalars;
  if (number >= item.entry.n || is_skipped(scalars.found_inf)) return;
  int64_t rest = number, offset[kStepTensors] = {};
#pragma unroll
  for (int d = StepItem::kMaxDims - 1; d >= 0; --d) {
    if (d >= item.ndim) continue;
    int64_t at = rest % item.shape[d];
    rest /= item.shape[d];
#pragma unroll
    for (int t = 0; t < kStepTensors; ++t) offset[t] += at * item.strides[t][d];
  }
  const Step<C> step = step_of(item.steps, item.entry, scalars);
  void* const* data = item.entry.data;
  auto load = [&](int t, DType dtype) { return data[t] != nullptr ? load_as<C>(dtype, data[t], offset[t]) : C(0); };
  auto store = [&](int t, DType dtype, C x, bool stochastic = false, uint32_t noise = 0) {
    if (data[t] != nullptr) store_as(dtype, data[t], offset[t], x, stochastic, number, noise);
  };
  const DType wide = DType::kF32;  // of float64 the only dtype is known
  const bool has_master = data[kMaster] != nullptr;
  C p = has_master ? load(kMaster, wide) : load(kParam, item.dtype);
  C g = gradient<true, C>(load(kGrad, item.dtype), p, scale_of(scalars), scalars);
  C m = load(kFirst, item.state_dtype), v = load(kSecond, item.state_dtype), top = load(kTop, item.state_dtype);
  Rule::update(p, g, m, v, top, data[kTop] != nullptr, step, scalars);
  store(kParam, item.dtype, p, scalars.stochastic_params, adam_noise_of_param(step.noise));
  store(kMaster, wide, p);
  store(kEma, wide, lerp(load(kEma, wide), p, scalars.ema_weight));
  store(kFirst, item.state_dtype, m);
  store(kSecond, item.state_dtype, v, scalars.stochastic, step.noise);
  store(kTop, item.state_dtype, top);
}

// --- launches ---------------------------------------------------------------------------------------------------------
struct Call {
  const Target& target;
  const std::vector<StepItem>& items;
  const StepOptions& options;
  const StepOnDevice& on_device;
};

template <class C, int kTensors> Entry<C, kTensors> entry_of(const Call& call, int place) {
  const StepItem& item = call.items[place];
  Entry<C, kTensors> entry{{}, item.n, {}, place, 0, true};
  if (call.on_device.workspace == nullptr) entry.step = rounded<C>(step_at(item.step, call.options.lr, place, call.options));
  for (int t = 0; t < kTensors && t < kStepTensors; ++t) {
    entry.data[t] = item.data[t];
    entry.aligned = entry.aligned && aligned16(item.data[t]);
  }
  if constexpr (kTensors == kPackedTensors) entry.data[kFirstScales] = item.scales[0], entry.data[kSecondScales] = item.scales[1];
  return entry;
}

template <class C, int kTensors>
void launch_tables(const Call& call, const char* op, void (*kernel)(Table<C, kTensors>), int64_t per_block,
                   const std::vector<int>& places) {
  Table<C, kTensors> table{scalars_of<C>(call.options, call.on_device), static_cast<const Step<double>*>(call.on_device.workspace),
                           0, {}};
  int64_t blocks = 0;
  auto flush = [&] {
    launch(call.target, op, kernel, grid_of(blocks), kThreads, 0, table);
    table.count = 0;
    blocks = 0;
  };
  for (int place : places) {
    auto entry = entry_of<C, kTensors>(call, place);
    int64_t needed = ceil_div(entry.n, per_block);
    if (table.count == table.kEntries || (table.count > 0 && blocks + needed > 0x7fffffff)) flush();
    entry.first_block = int(blocks);
    table.entries[table.count++] = entry;
    blocks += needed;
  }
  flush();
}

template <class Rule, class C> void launch_strided(const Call& call, int place) {
  const StepItem& item = call.items[place];
  StridedItem<C> strided{scalars_of<C>(call.options, call.on_device), static_cast<const Step<double>*>(call.on_device.workspace),
                         entry_of<C, kStepTensors>(call, place), item.dtype, item.state_dtype, item.ndim, {}, {}};
  for (int d = 0; d < item.ndim; ++d) {
    strided.shape[d] = item.shape[d];
    for (int t = 0; t < kStepTensors; ++t) strided.strides[t][d] = item.strides[t][d];
  }
  launch(call.target, Rule::kOp, step_strided_kernel<Rule, C>, grid_of(ceil_div(item.n, kThreads)), kThreads, 0, strided);
}

template <class Rule, class T, class S> void step_dtypes(const Call& call, const std::vector<int>& places) {
  using C = compute_t<T>;
  bool extras = call.options.l1 != 0 || call.on_device.found_inf.data != nullptr;
  std::vector<int> flat;
  for (int place : places) {
    const StepItem& item = call.items[place];
    extras = extras || item.data[kMaster] != nullptr || item.data[kEma] != nullptr;
    if (item.flat) {
      flat.push_back(place);
    } else {
      launch_strided<Rule, C>(call, place);
    }
  }
  constexpr int64_t kPerBlock = kThreads * kVectorsPerThread * kStepWidth<T, S>;
  if constexpr (Rule::kSquares) {  // SGD has registers to spare, and one kernel for both
    if (!extras) return launch_tables(call, Rule::kOp, step_kernel<Rule, T, S, false>, kPerBlock, flat);
  }
  launch_tables(call, Rule::kOp, step_kernel<Rule, T, S, true>, kPerBlock, flat);
}

template <class T> void step_8bit(const Call& call, const std::vector<int>& places) {
  launch_tables(call, Adam::kOp, adam_8bit_kernel<T>, int64_t(kStateBlock) * kBlocksPerWarp * kWarps, places);
}

template <class Run> void run_dtypes(const Call& call, DType dtype, DType state_dtype, const Run& run) {
  std::vector<int> places;
  for (size_t i = 0; i < call.items.size(); ++i) {
    const StepItem& item = call.items[i];
    if (item.n > 0 && item.dtype == dtype && item.state_dtype == state_dtype) places.push_back(int(i));
  }
  if (!places.empty()) run(call, places);
}

template <class Rule> void run_rule(const Call& call) {
  run_dtypes(call, DType::kF32, DType::kF32, step_dtypes<Rule, float, float>);
  run_dtypes(call, DType::kF32, DType::kBF16, step_dtypes<Rule, float, bf16>);
  run_dtypes(call, DType::kBF16, DType::kF32, step_dtypes<Rule, bf16, float>);
  run_dtypes(call, DType::kBF16, DType::kBF16, step_dtypes<Rule, bf16, bf16>);
  run_dtypes(call, DType::kF16, DType::kF32, step_dtypes<Rule, f16, float>);
  run_dtypes(call, DType::kF16, DType::kF16, step_dtypes<Rule, f16, f16>);
  run_dtypes(call, DType::kF64, DType::kF64, step_dtypes<Rule, double, double>);
}

void count_steps(const Call& call) {
  const StepOnDevice& on_device = call.on_device;
  StepTable table{call.options, on_device.lr, on_device.found_inf, static_cast<Step<double>*>(on_device.workspace), 0, 0, {}};
  int count = static_cast<int>(on_device.steps.size());
  for (int first = 0; first < count; first += StepTable::kEntries) {
    table.first_place = first;
    table.count = std::min(count - first, StepTable::kEntries);
    std::copy_n(on_device.steps.begin() + first, table.count, table.entries);
    launch(call.target, "counting steps", count_steps_kernel, grid_of(ceil_div(table.count, kThreads)), kThreads, 0, table);
  }
}

}  // namespace

void optimizer_step(const Target& target, const std::vector<StepItem>& items, const StepOptions& options,
                    const StepOnDevice& on_device) {
  Call call{target, items, options, on_device};
  count_steps(call);
  if (options.rule == StepRule::kSgd) return run_rule<Sgd>(call);
  run_rule<Adam>(call);
  run_dtypes(call, DType::kF32, DType::kU8, step_8bit<float>);
  run_dtypes(call, DType::kBF16, DType::kU8, step_8bit<bf16>);
  run_dtypes(call, DType::kF16, DType::kU8, step_8bit<f16>);
}

// --- the norm of gradients --------------------------------------------------------------------------------------------
namespace {

constexpr int64_t kNormChunk = 32768;  // elements of a block: in their own type by thread, in double from there on

struct NormTable {
  struct Entry {
    const void* data;
    int64_t n;
    int first_block;
    bool aligned;
  };
  static constexpr int kEntries = (kArgumentBytes - 16) / sizeof(Entry);
  double* partial;
  int count;
  Entry entries[kEntries];
};
static_assert(sizeof(NormTable) <= kArgumentBytes);

template <class T> __global__ void __launch_bounds__(kThreads) grad_norm_kernel(const __grid_constant__ NormTable table) {
  using C = compute_t<T>;
  const NormTable::Entry& entry = entry_of_block(table);
  int64_t begin = (blockIdx.x - entry.first_block) * kNormChunk, end = begin + kNormChunk < entry.n ? begin + kNormChunk : entry.n;
  constexpr int kUnroll = 4;  // independent 16-byte loads in flight
  const T* x = static_cast<const T*>(entry.data);
  C sum[kVector<T>] = {};
  for (int64_t i = begin + int64_t(threadIdx.x) * kVector<T>; i < end; i += kUnroll * kThreads * kVector<T>) {
    Vector<T> a[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      int64_t at = i + u * kThreads * kVector<T>;
      a[u] = load_count(x + at, end - at, entry.aligned);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
      for (int e = 0; e < kVector<T>; ++e) sum[e] += C(widen(a[u].at[e])) * C(widen(a[u].at[e]));
    }
  }
  double total = 0;
#pragma unroll
  for (int e = 0; e < kVector<T>; ++e) total += sum[e];
  total = block_sum<kThreads>(total);
  if (threadIdx.x == 0) table.partial[blockIdx.x] = total;
}

__global__ void __launch_bounds__(kThreads) grad_norm_sum_kernel(const double* partial, DeviceScalar norm, int64_t chunks) {
  double total = 0;
  for (int64_t i = threadIdx.x; i < chunks; i += kThreads) total += partial[i];
  total = sqrt(block_sum<kThreads>(total));
  if (threadIdx.x != 0) return;
  if (norm.wide) {
    *static_cast<double*>(norm.data) = total;
  } else {
    *static_cast<float*>(norm.data) = static_cast<float>(total);
  }
}

}  // namespace

int64_t norm_chunks(const std::vector<NormArray>& arrays) {
  int64_t chunks = 0;
  for (const NormArray& array : arrays) chunks += ceil_div(array.n, kNormChunk);
  return chunks;
}

void norm_of(const Target& target, const std::vector<NormArray>& arrays, const DeviceScalar& norm, double* partial) {
  double* rest = partial;
  for (DType dtype : {DType::kF32, DType::kBF16, DType::kF16, DType::kF64}) {
    dispatch_float(dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      NormTable table{rest, 0, {}};
      int64_t blocks = 0;
      auto flush = [&] {
        launch(target, "grad_norm", grad_norm_kernel<T>, grid_of(blocks), kThreads, 0, table);
        rest = table.partial += blocks;
        table.count = 0;
        blocks = 0;
      };
      for (const NormArray& array : arrays) {
        if (array.dtype != dtype || array.n == 0) continue;
        int64_t needed = ceil_div(array.n, kNormChunk);
        if (table.count == NormTable::kEntries || (table.count > 0 && blocks + needed > 0x7fffffff)) flush();
        table.entries[table.count++] = {array.data, array.n, int(blocks), aligned16(array.data)};
        blocks += needed;
      }
      flush();
    });
  }
  launch(target, "grad_norm", grad_norm_sum_kernel, dim3(1), kThreads, 0, static_cast<const double*>(partial), norm,
         norm_chunks(arrays));
}

}  // namespace fastlm::cuda
