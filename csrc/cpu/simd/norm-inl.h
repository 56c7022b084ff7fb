// Layer norm and RMS norm, with the residual added first where there is one: a row is read into the cache once.
#include <cmath>
#include <cstdint>

#include "norm.h"
#include "sums-inl.h"
#include "vec.h"

namespace fastlm::cpu::FASTLM_ISA {
namespace {

template <class T> inline compute_t<T> mean_of(const T* row, int64_t n) {
  auto value = [&](int64_t i, int count, vec_t<T>(&out)[1]) { out[0] = load_count(row + i, count); };
  return static_cast<compute_t<T>>(sums_over<1, vec_t<T>>(n, value).of[0] / n);
}
template <class T> inline compute_t<T> inverse_deviation(double squares, int64_t n, double eps) {
  return static_cast<compute_t<T>>(1 / std::sqrt(squares / n + eps));
}

template <class T>
void norm_forward(const void* x_, const void* residual_, const void* weight_, const void* bias_, void* y_, void* sum_,
                  int64_t rows, int64_t cols, double eps, bool centred, bool past_caches) {
  const Output output(past_caches);
  using V = vec_t<T>;
  using C = compute_t<T>;
  const T *x = static_cast<const T*>(x_), *residual = static_cast<const T*>(residual_);
  const C *weight = static_cast<const C*>(weight_), *bias = static_cast<const C*>(bias_);
  T *y = static_cast<T*>(y_), *sum = static_cast<T*>(sum_);
  for (int64_t r = 0; r < rows; ++r, x += cols, y += cols) {
    const T* s = x;
    if (residual != nullptr) {
      for_each_vector<V>(cols, [&](int64_t i, int count) {
        store_count(sum + i, load_count(x + i, count) + load_count(residual + i, count), count);
      });
      s = sum, sum += cols, residual += cols;
    }
    const V mean = splat<V>(centred ? mean_of(s, cols) : 0);
    auto square = [&](int64_t i, int count, V(&out)[1]) {
      V d = load_count(s + i, count) - mean;
      out[0] = d * d;
    };
    const V inverse = splat<V>(inverse_deviation<T>(sums_over<1, V>(cols, square).of[0], cols, eps));
    for_each_vector<V>(cols, [&](int64_t i, int count) {
      V v = (load_count(s + i, count) - mean) * inverse;
      if (weight != nullptr) v *= load_count(weight + i, count);
      if (bias != nullptr) v += load_count(bias + i, count);
      output.store_count(y + i, v, count);
    });
  }
}

template <class T>
void norm_backward(const void* dy_, const void* dsum_, const void* s_, const void* weight_, void* dx_, void* dweight_,
                   void* dbias_, int64_t rows, int64_t cols, double eps, bool centred, bool past_caches) {
  const Output output(past_caches);
  using V = vec_t<T>;
  using C = compute_t<T>;
  const T *dy = static_cast<const T*>(dy_), *dsum = static_cast<const T*>(dsum_), *s = static_cast<const T*>(s_);
  const C* weight = static_cast<const C*>(weight_);
  T* dx = static_cast<T*>(dx_);
  C *dweight = static_cast<C*>(dweight_), *dbias = static_cast<C*>(dbias_);
  for (int64_t i = 0; i < cols; ++i) {
    if (dweight != nullptr) dweight[i] = 0;
    if (dbias != nullptr) dbias[i] = 0;
  }
  for (int64_t r = 0; r < rows; ++r, dy += cols, s += cols, dx += cols) {
    const V mean = splat<V>(centred ? mean_of(s, cols) : 0);
    auto weighted = [&](int64_t i, int count) {
      V g = load_count(dy + i, count);
      return weight != nullptr ? g * load_count(weight + i, count) : g;
    };
    auto sums = sums_over<3, V>(cols, [&](int64_t i, int count, V(&out)[3]) {
      V d = load_count(s + i, count) - mean, g = weighted(i, count);
      out[0] = d * d, out[1] = g * d, out[2] = g;
    });
    const C inverse = inverse_deviation<T>(sums.of[0], cols, eps);
    const V scale = splat<V>(inverse), level = splat<V>(centred ? sums.of[2] / cols : 0);
    const V along = splat<V>(sums.of[1] * inverse / cols);
    for_each_vector<V>(cols, [&](int64_t i, int count) {
      V u = (load_count(s + i, count) - mean) * scale, dy_i = load_count(dy + i, count);
      if (dweight != nullptr) store_count(dweight + i, fma(dy_i, u, load_count(dweight + i, count)), count);
      if (dbias != nullptr) store_count(dbias + i, load_count(dbias + i, count) + dy_i, count);
      V d = scale * (weighted(i, count) - level - u * along);
      if (dsum != nullptr) d += load_count(dsum + i, count);
      output.store_count(dx + i, d, count);
    });
    if (dsum != nullptr) dsum += cols;
  }
}

template <class T> constexpr NormKernels::OfDType norm_kernels = {norm_forward<T>, norm_backward<T>};
constexpr NormKernels kNormKernels = {FASTLM_FOR_FLOATS(norm_kernels)};

}  // namespace
}  // namespace fastlm::cpu::FASTLM_ISA
