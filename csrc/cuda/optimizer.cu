// One step of Adam or AdamW: one pass over memory, 7 words a parameter (reads p, g, m, v; writes p, m, v), in place on
// any strides. 16-bit tensors are computed in float and rounded when stored. And the norm of gradients, one pass more.
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
  DeviceScalar scale;
  C sign;    // -1 to maximize, else 1
  C l2;      // weight decay that is added to the gradient
  C weight;  // 1 - beta1, of the new gradient
  C beta2, one_minus_beta2;
  C eps;
  bool stochastic, stochastic_params;
};

// What depends on the step of a parameter.
template <class C> struct Step {
  C step_size;   // lr / (1 - beta1^t)
  C correction;  // sqrt(1 - beta2^t)
  C decay;       // 1 - lr * weight decay, which scales the parameter
  uint32_t noise;
};
static_assert(sizeof(Step<double>) == kStepWorkspace * sizeof(double));

FASTLM_HOST_DEVICE inline Step<double> step_at(double t, double lr, uint32_t place, const StepOptions& o) {
  return {lr / (1 - pow(o.beta1, t)), sqrt(1 - pow(o.beta2, t)), o.decoupled ? 1 - lr * o.weight_decay : 1.0,
          adam_noise(t, place, o.seed)};
}
template <class C> FASTLM_HOST_DEVICE inline Step<C> rounded(const Step<double>& s) {
  return {C(s.step_size), C(s.correction), C(s.decay), s.noise};
}

template <class C> struct Entry {
  void* data[kStepTensors];
  int64_t n;
  Step<C> step;
  int place;  // in the list of all parameters
  int first_block;
  bool aligned;
};

template <class C> struct Table {
  Scalars<C> scalars;
  const Step<double>* steps;  // by place, in device memory, or null: then entries have them
  int count;
  static constexpr int kEntries = (kArgumentBytes - sizeof(Scalars<C>) - 2 * sizeof(void*)) / sizeof(Entry<C>);
  Entry<C> entries[kEntries];
};
static_assert(sizeof(Table<float>) <= kArgumentBytes && sizeof(Table<double>) <= kArgumentBytes);

template <class C> struct StridedItem {
  Scalars<C> scalars;
  const Step<double>* steps;
  Entry<C> entry;
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

// --- steps that lie on the device -------------------------------------------------------------------------------------
struct StepTable {
  static constexpr int kEntries = (kArgumentBytes - sizeof(StepOptions) - 64) / sizeof(DeviceScalar);
  StepOptions options;
  DeviceScalar lr;
  Step<double>* steps;
  int count, first_place;
  DeviceScalar entries[kEntries];
};
static_assert(sizeof(StepTable) <= kArgumentBytes);

// Counts this step, and leaves what follows from it where adam_kernel looks: a parameter a thread.
__global__ void __launch_bounds__(kThreads) adam_count_kernel(const __grid_constant__ StepTable table) {
  int i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= table.count) return;
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

// --- the step ---------------------------------------------------------------------------------------------------------
// Steps one element; `top` is the running maximum, looked at only with amsgrad.
template <class C>
__device__ void update(C& p, C g, C& m, C& v, C& top, bool amsgrad, C scale, const Step<C>& step, const Scalars<C>& s) {
  g *= scale;
  if (s.l2 != 0) g += s.l2 * p;  // not 0 * p, which is NaN where p is infinite
  // m + weight (g - m), from the nearer end: weight 1 gives g however large m is
  m = s.weight < C(0.5) ? m + s.weight * (g - m) : g + (s.weight - 1) * (g - m);
  v = s.beta2 * v + s.one_minus_beta2 * g * g;
  C second = v;
  if (amsgrad) {
    top = top > v || top != top ? top : v;  // NaN in either stays NaN
    second = top;
  }
  p = p * step.decay - step.step_size * (m / (sqrt(second) / step.correction + s.eps));
}

// Up with the probability of the part that is cut off; inf and NaN as they are.
__device__ inline bf16 narrow_at_random(float x, int64_t i, uint32_t noise) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if ((bits & 0x7f800000u) == 0x7f800000u) return narrow<bf16>(x);
  uint16_t high = static_cast<uint16_t>((bits + adam_random_bits(i, noise)) >> 16);
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

template <class T, class S> constexpr int kStepWidth = kVector<T> > kVector<S> ? kVector<T> : kVector<S>;

// Parameters and gradients of T, states of S.
template <class T, class S>
__global__ void __launch_bounds__(kThreads) adam_kernel(const __grid_constant__ Table<compute_t<T>> table) {
  using C = compute_t<T>;
  constexpr int kWidth = kStepWidth<T, S>;
  const Entry<C>& entry = entry_of_block(table);
  const Scalars<C>& scalars = table.scalars;
  const Step<C> step = table.steps != nullptr ? rounded<C>(table.steps[entry.place]) : entry.step;
  const C scale = scalars.scale.data != nullptr ? scalars.sign * C(value_of(scalars.scale)) : scalars.sign;
  const uint32_t noise_of_param = adam_noise_of_param(step.noise);
  bool amsgrad = entry.data[kTop] != nullptr, aligned = entry.aligned;
  int64_t first = (int64_t(blockIdx.x - entry.first_block) * kVectorsPerThread * kThreads + threadIdx.x) * kWidth;
#pragma unroll 1
  for (int u = 0; u < kVectorsPerThread; ++u) {
    int64_t i = first + int64_t(u) * kThreads * kWidth, count = entry.n - i;
    if (count <= 0) return;
    Elements<T, kWidth> p, g;
    Elements<S, kWidth> m, v, top;
    p.load(entry.data[kParam], i, count, aligned);
    g.load(entry.data[kGrad], i, count, aligned);
    m.load(entry.data[kFirst], i, count, aligned);
    v.load(entry.data[kSecond], i, count, aligned);
    if (amsgrad) {
      top.load(entry.data[kTop], i, count, aligned);
    } else {
      top = v;
    }
#pragma unroll
    for (int e = 0; e < kWidth; ++e) {
      C pe = widen(p[e]), me = widen(m[e]), ve = widen(v[e]), te = widen(top[e]);
      update<C>(pe, widen(g[e]), me, ve, te, amsgrad, scale, step, scalars);
      p[e] = stored<T>(pe, scalars.stochastic_params, i + e, noise_of_param);
      m[e] = narrow<S>(me);
      v[e] = stored<S>(ve, scalars.stochastic, i + e, step.noise);
      top[e] = narrow<S>(te);
    }
    p.store(entry.data[kParam], i, count, aligned);
    m.store(entry.data[kFirst], i, count, aligned);
    v.store(entry.data[kSecond], i, count, aligned);
    if (amsgrad) top.store(entry.data[kTop], i, count, aligned);
  }
}

// One element a thread, each tensor by its own strides.
template <class T, class S>
__global__ void __launch_bounds__(kThreads) adam_strided_kernel(const __grid_constant__ StridedItem<compute_t<T>> item) {
  using C = compute_t<T>;
  const int64_t number = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (number >= item.entry.n) return;
  int64_t rest = number, offset[kStepTensors] = {};
#pragma unroll
  for (int d = StepItem::kMaxDims - 1; d >= 0; --d) {
    if (d >= item.ndim) continue;
    int64_t at = rest % item.shape[d];
    rest /= item.shape[d];
#pragma unroll
    for (int t = 0; t < kStepTensors; ++t) offset[t] += at * item.strides[t][d];
  }
  const Scalars<C>& scalars = item.scalars;
  const Step<C> step = item.steps != nullptr ? rounded<C>(item.steps[item.entry.place]) : item.entry.step;
  const C scale = scalars.scale.data != nullptr ? scalars.sign * C(value_of(scalars.scale)) : scalars.sign;
  bool amsgrad = item.entry.data[kTop] != nullptr;
  T* p_at = static_cast<T*>(item.entry.data[kParam]) + offset[kParam];
  S* m_at = static_cast<S*>(item.entry.data[kFirst]) + offset[kFirst];
  S* v_at = static_cast<S*>(item.entry.data[kSecond]) + offset[kSecond];
  S* top_at = static_cast<S*>(item.entry.data[kTop]) + offset[kTop];
  C p = widen(*p_at), g = widen(static_cast<const T*>(item.entry.data[kGrad])[offset[kGrad]]);
  C m = widen(*m_at), v = widen(*v_at), top = amsgrad ? C(widen(*top_at)) : v;
  update<C>(p, g, m, v, top, amsgrad, scale, step, scalars);
  *p_at = stored<T>(p, scalars.stochastic_params, number, adam_noise_of_param(step.noise));
  *m_at = narrow<S>(m);
  *v_at = stored<S>(v, scalars.stochastic, number, step.noise);
  if (amsgrad) *top_at = narrow<S>(top);
}

template <class T, class S>
void step_dtypes(const Target& target, const std::vector<StepItem>& items, const std::vector<int>& places, const StepOptions& o,
                 const StepOnDevice& on_device) {
  using C = compute_t<T>;
  constexpr int kPerBlock = kThreads * kVectorsPerThread * kStepWidth<T, S>;
  Table<C> table;
  table.scalars = {on_device.scale,  C(o.maximize ? -1 : 1), C(o.decoupled ? 0 : o.weight_decay),
                   C(1 - o.beta1),   C(o.beta2),             C(1 - o.beta2),
                   C(o.eps),         o.stochastic,           o.stochastic_params};
  table.steps = static_cast<const Step<double>*>(on_device.workspace);
  table.count = 0;
  int64_t blocks = 0;
  auto flush = [&] {
    launch(target, "adam_", adam_kernel<T, S>, grid_of(blocks), kThreads, 0, table);
    table.count = 0;
    blocks = 0;
  };
  for (int place : places) {
    const StepItem& item = items[place];
    Entry<C> entry{{}, item.n, {}, place, 0, true};
    if (on_device.workspace == nullptr) entry.step = rounded<C>(step_at(item.step, o.lr, place, o));
    for (int t = 0; t < kStepTensors; ++t) {
      entry.data[t] = item.data[t];
      entry.aligned = entry.aligned && aligned16(item.data[t]);
    }
    if (item.flat) {
      int64_t needed = ceil_div(item.n, kPerBlock);
      if (table.count == Table<C>::kEntries || (table.count > 0 && blocks + needed > 0x7fffffff)) flush();
      entry.first_block = int(blocks);
      table.entries[table.count++] = entry;
      blocks += needed;
    } else {
      StridedItem<C> strided{table.scalars, table.steps, entry, item.ndim, {}, {}};
      for (int d = 0; d < item.ndim; ++d) {
        strided.shape[d] = item.shape[d];
        for (int t = 0; t < kStepTensors; ++t) strided.strides[t][d] = item.strides[t][d];
      }
      launch(target, "adam_", adam_strided_kernel<T, S>, grid_of(ceil_div(item.n, kThreads)), kThreads, 0, strided);
    }
  }
  flush();
}

void count_steps(const Target& target, const StepOptions& options, const StepOnDevice& on_device) {
  StepTable table{options, on_device.lr, static_cast<Step<double>*>(on_device.workspace), 0, 0, {}};
  int count = static_cast<int>(on_device.steps.size());
  for (int first = 0; first < count; first += StepTable::kEntries) {
    table.first_place = first;
    table.count = std::min(count - first, StepTable::kEntries);
    std::copy_n(on_device.steps.begin() + first, table.count, table.entries);
    launch(target, "adam_", adam_count_kernel, grid_of(ceil_div(table.count, kThreads)), kThreads, 0, table);
  }
}

}  // namespace

void adam_step(const Target& target, const std::vector<StepItem>& items, const StepOptions& options,
               const StepOnDevice& on_device) {
  count_steps(target, options, on_device);
  auto run = [&](DType dtype, DType state_dtype, auto step) {
    std::vector<int> places;
    for (size_t i = 0; i < items.size(); ++i) {
      if (items[i].n > 0 && items[i].dtype == dtype && items[i].state_dtype == state_dtype) places.push_back(int(i));
    }
    if (!places.empty()) step(target, items, places, options, on_device);
  };
  run(DType::kF32, DType::kF32, step_dtypes<float, float>);
  run(DType::kF32, DType::kBF16, step_dtypes<float, bf16>);
  run(DType::kBF16, DType::kF32, step_dtypes<bf16, float>);
  run(DType::kBF16, DType::kBF16, step_dtypes<bf16, bf16>);
  run(DType::kF16, DType::kF16, step_dtypes<f16, f16>);
  run(DType::kF64, DType::kF64, step_dtypes<double, double>);
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
