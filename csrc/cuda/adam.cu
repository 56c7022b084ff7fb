// One step of Adam or AdamW: one pass over memory, 7 words a parameter (reads p, g, m, v; writes p, m, v), in place on
// any strides. 16-bit tensors are computed in float and rounded when stored.
#include "adam.h"

#include <cmath>

#include "common.cuh"

namespace fastlm::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kVectorsPerThread = 4;
// Tensors per launch: a kernel's arguments may take 4 KB.
constexpr int kEntries = 48;

// The same for all parameters of a step. Rounded once, from double.
template <class C> struct Scalars {
  C sign;          // -1 to maximize, else 1
  C l2;            // weight decay that is added to the gradient
  C decay;         // 1 - lr * weight decay, which scales the parameter
  C weight;        // 1 - beta1, of the new gradient
  C beta2, one_minus_beta2;
  C eps;
};

template <class C> struct Entry {
  void* data[kAdamTensors];
  int64_t n;
  C step_size;   // lr / (1 - beta1^t)
  C correction;  // sqrt(1 - beta2^t)
  int first_block;
  bool aligned;
};

template <class C> struct Table {
  Scalars<C> scalars;
  int count;
  Entry<C> entries[kEntries];
};
static_assert(sizeof(Table<double>) <= 4096);

template <class C> struct StridedItem {
  Scalars<C> scalars;
  Entry<C> entry;
  int ndim;
  int64_t shape[AdamItem::kMaxDims];
  int64_t strides[kAdamTensors][AdamItem::kMaxDims];
};

// Steps one element; `top` is the running maximum, looked at only with amsgrad.
template <class C>
__device__ void update(C& p, C g, C& m, C& v, C& top, bool amsgrad, C step_size, C correction, const Scalars<C>& s) {
  g *= s.sign;
  if (s.l2 != 0) g += s.l2 * p;  // not 0 * p, which is NaN where p is infinite
  // m + weight (g - m), from the nearer end: weight 1 gives g however large m is
  m = s.weight < C(0.5) ? m + s.weight * (g - m) : g + (s.weight - 1) * (g - m);
  v = s.beta2 * v + s.one_minus_beta2 * g * g;
  C second = v;
  if (amsgrad) {
    top = top > v || top != top ? top : v;  // NaN in either stays NaN
    second = top;
  }
  p = p * s.decay - step_size * (m / (sqrt(second) / correction + s.eps));
}

template <class T> __global__ void __launch_bounds__(kThreads) adam_kernel(const Table<compute_t<T>> table) {
  using C = compute_t<T>;
  int low = 0, high = table.count - 1;  // the last entry that starts at or before this block
  while (low < high) {
    int middle = (low + high + 1) / 2;
    if (table.entries[middle].first_block <= int(blockIdx.x)) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  const Entry<C>& entry = table.entries[low];
  T* param = static_cast<T*>(entry.data[kParam]);
  const T* grad = static_cast<const T*>(entry.data[kGrad]);
  T* exp_avg = static_cast<T*>(entry.data[kExpAvg]);
  T* exp_avg_sq = static_cast<T*>(entry.data[kExpAvgSq]);
  T* max_exp_avg_sq = static_cast<T*>(entry.data[kMaxExpAvgSq]);
  bool amsgrad = max_exp_avg_sq != nullptr, aligned = entry.aligned;
  int64_t first = (int64_t(blockIdx.x - entry.first_block) * kVectorsPerThread * kThreads + threadIdx.x) * kVector<T>;
#pragma unroll 1
  for (int u = 0; u < kVectorsPerThread; ++u) {
    int64_t i = first + int64_t(u) * kThreads * kVector<T>, count = entry.n - i;
    if (count <= 0) return;
    Vector<T> p = load_count(param + i, count, aligned), g = load_count(grad + i, count, aligned);
    Vector<T> m = load_count(exp_avg + i, count, aligned), v = load_count(exp_avg_sq + i, count, aligned);
    Vector<T> top = amsgrad ? load_count(max_exp_avg_sq + i, count, aligned) : v;
#pragma unroll
    for (int e = 0; e < kVector<T>; ++e) {
      C pe = widen(p.at[e]), me = widen(m.at[e]), ve = widen(v.at[e]), te = widen(top.at[e]);
      update<C>(pe, widen(g.at[e]), me, ve, te, amsgrad, entry.step_size, entry.correction, table.scalars);
      p.at[e] = narrow<T>(pe);
      m.at[e] = narrow<T>(me);
      v.at[e] = narrow<T>(ve);
      top.at[e] = narrow<T>(te);
    }
    store_count(param + i, p, count, aligned);
    store_count(exp_avg + i, m, count, aligned);
    store_count(exp_avg_sq + i, v, count, aligned);
    if (amsgrad) store_count(max_exp_avg_sq + i, top, count, aligned);
  }
}

// One element a thread, each tensor by its own strides.
template <class T> __global__ void __launch_bounds__(kThreads) adam_strided_kernel(const StridedItem<compute_t<T>> item) {
  using C = compute_t<T>;
  int64_t rest = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (rest >= item.entry.n) return;
  int64_t offset[kAdamTensors] = {};
#pragma unroll
  for (int d = AdamItem::kMaxDims - 1; d >= 0; --d) {
    if (d >= item.ndim) continue;
    int64_t at = rest % item.shape[d];
    rest /= item.shape[d];
#pragma unroll
    for (int t = 0; t < kAdamTensors; ++t) offset[t] += at * item.strides[t][d];
  }
  bool amsgrad = item.entry.data[kMaxExpAvgSq] != nullptr;
  T* at[kAdamTensors];
#pragma unroll
  for (int t = 0; t < kAdamTensors; ++t) at[t] = static_cast<T*>(item.entry.data[t]) + offset[t];
  C p = widen(*at[kParam]), m = widen(*at[kExpAvg]), v = widen(*at[kExpAvgSq]);
  C top = amsgrad ? C(widen(*at[kMaxExpAvgSq])) : v;
  update<C>(p, widen(*at[kGrad]), m, v, top, amsgrad, item.entry.step_size, item.entry.correction, item.scalars);
  *at[kParam] = narrow<T>(p);
  *at[kExpAvg] = narrow<T>(m);
  *at[kExpAvgSq] = narrow<T>(v);
  if (amsgrad) *at[kMaxExpAvgSq] = narrow<T>(top);
}

template <class C> Scalars<C> scalars_of(const AdamOptions& o) {
  return {C(o.maximize ? -1 : 1),
          C(o.decoupled ? 0 : o.weight_decay),
          C(o.decoupled ? 1 - o.lr * o.weight_decay : 1),
          C(1 - o.beta1),
          C(o.beta2),
          C(1 - o.beta2),
          C(o.eps)};
}

template <class C> Entry<C> entry_of(const AdamItem& item, const AdamOptions& o, int first_block) {
  Entry<C> entry{{}, item.n, C(o.lr / (1 - std::pow(o.beta1, item.step))), C(std::sqrt(1 - std::pow(o.beta2, item.step))),
                 first_block, true};
  for (int t = 0; t < kAdamTensors; ++t) {
    entry.data[t] = item.data[t];
    entry.aligned = entry.aligned && aligned16(item.data[t]);
  }
  return entry;
}

template <class T>
void step_dtype(const Target& target, DType dtype, const std::vector<AdamItem>& items, const AdamOptions& options) {
  using C = compute_t<T>;
  Table<C> table{scalars_of<C>(options), 0, {}};
  int64_t blocks = 0;
  auto flush = [&] {
    launch(target, "adam_", adam_kernel<T>, grid_of(blocks), kThreads, 0, table);
    table.count = 0;
    blocks = 0;
  };
  for (const AdamItem& item : items) {
    if (item.dtype != dtype || item.n == 0) continue;
    if (item.flat) {
      int64_t needed = ceil_div(item.n, kThreads * kVectorsPerThread * kVector<T>);
      if (table.count == kEntries || (table.count > 0 && blocks + needed > 0x7fffffff)) flush();
      table.entries[table.count++] = entry_of<C>(item, options, int(blocks));
      blocks += needed;
    } else {
      StridedItem<C> strided{table.scalars, entry_of<C>(item, options, 0), item.ndim, {}, {}};
      for (int d = 0; d < item.ndim; ++d) {
        strided.shape[d] = item.shape[d];
        for (int t = 0; t < kAdamTensors; ++t) strided.strides[t][d] = item.strides[t][d];
      }
      launch(target, "adam_", adam_strided_kernel<T>, grid_of(ceil_div(item.n, kThreads)), kThreads, 0, strided);
    }
  }
  flush();
}

}  // namespace

void adam_step(const Target& target, const std::vector<AdamItem>& items, const AdamOptions& options) {
  for (DType dtype : {DType::kF32, DType::kBF16, DType::kF16, DType::kF64}) {
    dispatch_float(dtype, [&](auto tag) {
      step_dtype<typename decltype(tag)::type>(target, dtype, items, options);
    });
  }
}

}  // namespace fastlm::cuda
