#pragma once

#include <cstdint>

#include "vec.h"

namespace fastlm::cpu::FASTLM_ISA {
namespace {

// The sums over an array of the N vectors that terms(i, count, out) gives: in the lanes of two vectors each within a run, in
// double across runs.
template <int N> struct Sums {
  double of[N] = {};
};
template <int N, class V, class Terms> inline Sums<N> sums_over(int64_t n, const Terms& terms) {
  constexpr int64_t kL = lanes_of<V>, kRun = 4096;
  Sums<N> total;
  for (int64_t i = 0; i < n;) {
    const int64_t end = n - i < kRun ? n : i + kRun;
    V even[N] = {}, odd[N] = {}, out[N];
    for (; i + 2 * kL <= end; i += 2 * kL) {
      terms(i, static_cast<int>(kL), out);
      for (int k = 0; k < N; ++k) even[k] += out[k];
      terms(i + kL, static_cast<int>(kL), out);
      for (int k = 0; k < N; ++k) odd[k] += out[k];
    }
    for (; i < end; i += kL) {
      int count = static_cast<int>(end - i < kL ? end - i : kL);
      terms(i, count, out);
      for (int k = 0; k < N; ++k) even[k] += first_of(out[k], count);
    }
    i = end;
    for (int k = 0; k < N; ++k) total.of[k] += reduce_add(even[k] + odd[k]);
  }
  return total;
}

}  // namespace
}  // namespace fastlm::cpu::FASTLM_ISA
