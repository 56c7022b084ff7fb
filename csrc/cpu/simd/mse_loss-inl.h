#include <cstdint>

#include "mse_loss.h"
#include "sums-inl.h"
#include "vec.h"

namespace fastlm::cpu::FASTLM_ISA {
namespace {

template <class T> double mse_loss_forward(const void* x_, const void* target_, int64_t n) {
  const T *x = static_cast<const T*>(x_), *target = static_cast<const T*>(target_);
  return sums_over<1, vec_t<T>>(n, [&](int64_t i, int count, vec_t<T>(&out)[1]) {
           const vec_t<T> d = load_count(x + i, count) - load_count(target + i, count);
           out[0] = d * d;
         }).of[0];
}

template <class T>
void mse_loss_backward(const void* x_, const void* target_, double scale, void* dx_, int64_t n, bool past_caches) {
  using V = vec_t<T>;
  const T *x = static_cast<const T*>(x_), *target = static_cast<const T*>(target_);
  T* dx = static_cast<T*>(dx_);
  const V factor = splat<V>(scale);
  const Output output(past_caches);
  for_each_vector<V>(n, [&](int64_t i, int count) {
    output.store_count(dx + i, factor * (load_count(x + i, count) - load_count(target + i, count)), count);
  });
}

constexpr MseLossKernels kMseLossKernels = {FASTLM_FOR_FLOATS(mse_loss_forward), FASTLM_FOR_FLOATS(mse_loss_backward)};

}  // namespace
}  // namespace fastlm::cpu::FASTLM_ISA
