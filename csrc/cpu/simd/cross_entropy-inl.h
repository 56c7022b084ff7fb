// Cross-entropy over rows of logits: forward reads them once, backward reads them again and writes their gradient.
#include <cmath>
#include <cstdint>

#include "cross_entropy.h"
#include "vec.h"

namespace fastlm::cpu::FASTLM_ISA {
namespace {

template <bool kCapped, class V> inline V logits_of(V x, V cap, V inverse_cap) {
  if constexpr (kCapped) return cap * tanh(x * inverse_cap);
  return x;
}

template <class T, bool kCapped>
void cross_entropy_forward_of(const T* x, const int64_t* target, compute_t<T>* loss, compute_t<T>* lse, int64_t rows,
                              const CrossEntropyShape& s) {
  using V = vec_t<T>;
  using C = compute_t<T>;
  constexpr int64_t kBlock = 2048;  // read for its maximum, and again from the first cache for its sum
  const V cap = splat<V>(s.softcap), inverse_cap = splat<V>(kCapped ? 1 / s.softcap : 0), log2_e = splat<V>(M_LOG2E);
  for (int64_t r = 0; r < rows; ++r, x += s.classes) {
    if (target[r] == s.ignored) {
      loss[r] = lse[r] = 0;
      continue;
    }
    double top = -INFINITY, total = 0, all = 0;  // total = sum of exp(z - top)
    for (int64_t begin = 0; begin < s.classes; begin += kBlock) {
      const T* block = x + begin;
      const int64_t n = s.classes - begin < kBlock ? s.classes - begin : kBlock;
      auto z = [&](int64_t i, int count) { return logits_of<kCapped>(load_count(block + i, count), cap, inverse_cap); };
      V tops = splat<V>(-INFINITY), sums = V{}, alls = V{};
      // A NaN may get lost here, and comes back with the sum.
      for_each_vector<V>(n, [&](int64_t i, int count) { tops = max(first_of(z(i, count), count, tops), tops); });
      C block_top = tops[0];
      for (int i = 1; i < lanes_of<V>; ++i) block_top = block_top > tops[i] ? block_top : tops[i];
      if (block_top > top) {
        total *= std::exp(top - block_top);
        top = block_top;
      }
      const V base = splat<V>(top == -INFINITY ? 0 : top);  // exp(-inf - -inf) would be NaN
      for_each_vector<V>(n, [&](int64_t i, int count) {
        V v = z(i, count);
        sums += first_of(exp2((v - base) * log2_e), count);
        alls += first_of(v, count);
      });
      total += reduce_add(sums);
      all += reduce_add(alls);
    }
    const double at = logits_of<kCapped>(load_n(x + target[r], 1), cap, inverse_cap)[0], rest = std::log(total);
    double value = (top - at) + rest;
    if (s.smoothing > 0) value = (1 - s.smoothing) * value + s.smoothing * ((top - all / s.classes) + rest);
    loss[r] = static_cast<C>(value);
    lse[r] = static_cast<C>(top + rest);
  }
}

template <class T, bool kCapped>
void cross_entropy_backward_of(const compute_t<T>* g, const compute_t<T>* dlse, const T* x, const int64_t* target,
                               const compute_t<T>* lse, T* dx, int64_t rows, const CrossEntropyShape& s,
                               bool past_caches) {
  const Output output(past_caches);
  using V = vec_t<T>;
  const V cap = splat<V>(s.softcap), inverse_cap = splat<V>(kCapped ? 1 / s.softcap : 0), log2_e = splat<V>(M_LOG2E);
  for (int64_t r = 0; r < rows; ++r, x += s.classes, dx += s.classes) {
    if (target[r] == s.ignored) {
      for_each_vector<V>(s.classes, [&](int64_t i, int count) { output.store_count(dx + i, V{}, count); });
      continue;
    }
    const V base = splat<V>(lse[r]), of_loss = splat<V>(g[r]), of_lse = splat<V>(dlse != nullptr ? dlse[r] : 0);
    // Of class i: p less its share of the target, times g, and p times dlse.
    auto store_gradient = [&](const T* from, int64_t i, int count, V wanted) {
      V v = load_count(from, count), z = logits_of<kCapped>(v, cap, inverse_cap);
      V p = exp2((z - base) * log2_e), d = fma(p, of_lse, fma(p, of_loss, -wanted));
      if constexpr (kCapped) {
        V t = z * inverse_cap;
        d *= splat<V>(1) - t * t;
      }
      output.store_count(dx + i, d, count);
    };
    const double even = s.smoothing > 0 ? g[r] * s.smoothing / s.classes : 0;
    const V spread = splat<V>(even);
    const T of_target = x[target[r]];  // dx may be x
    for_each_vector<V>(s.classes, [&](int64_t i, int count) { store_gradient(x + i, i, count, spread); });
    store_gradient(&of_target, target[r], 1, splat<V>(even + g[r] * (1 - s.smoothing)));
  }
}

template <class T>
void cross_entropy_forward(const void* x, const int64_t* target, void* loss, void* lse, int64_t rows,
                           const CrossEntropyShape& s) {
  auto run = s.softcap > 0 ? cross_entropy_forward_of<T, true> : cross_entropy_forward_of<T, false>;
  run(static_cast<const T*>(x), target, static_cast<compute_t<T>*>(loss), static_cast<compute_t<T>*>(lse), rows, s);
}
template <class T>
void cross_entropy_backward(const void* g, const void* dlse, const void* x, const int64_t* target, const void* lse,
                            void* dx, int64_t rows, const CrossEntropyShape& s, bool past_caches) {
  using C = compute_t<T>;
  auto run = s.softcap > 0 ? cross_entropy_backward_of<T, true> : cross_entropy_backward_of<T, false>;
  run(static_cast<const C*>(g), static_cast<const C*>(dlse), static_cast<const T*>(x), target,
      static_cast<const C*>(lse), static_cast<T*>(dx), rows, s, past_caches);
}

template <class T> constexpr CrossEntropyKernels::OfDType cross_entropy_kernels = {cross_entropy_forward<T>,
                                                                                  cross_entropy_backward<T>};
constexpr CrossEntropyKernels kCrossEntropyKernels = {FASTLM_FOR_FLOATS(cross_entropy_kernels)};

}  // namespace
}  // namespace fastlm::cpu::FASTLM_ISA
