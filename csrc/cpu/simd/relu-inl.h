// relu, squared relu and both after a bias: one pass over memory each.
#include <cstdint>

#include "relu.h"
#include "vec.h"

namespace fastlm::cpu::FASTLM_ISA {
namespace {

template <bool kSquared, class V> inline V act(V x) {
  V r = relu(x);
  return kSquared ? r * r : r;
}

// `saved` is the output of relu, or the input of squared relu.
template <bool kSquared, class V> inline V act_backward(V dy, V saved) {
  return saved <= V{} ? V{} : (kSquared ? dy * (saved + saved) : dy);
}

template <class T, bool kSquared> void relu_forward_of(const T* x, T* y, int64_t n) {
  for_each_vector<vec_t<T>>(n, [&](int64_t i, int count) {
    store_count(y + i, act<kSquared>(load_count(x + i, count)), count);
  });
}
template <class T> void relu_forward(const void* x, void* y, int64_t n, bool squared) {
  auto run = squared ? relu_forward_of<T, true> : relu_forward_of<T, false>;
  run(static_cast<const T*>(x), static_cast<T*>(y), n);
}

template <class T, bool kSquared> void relu_backward_of(const T* dy, const T* saved, T* dx, int64_t n) {
  for_each_vector<vec_t<T>>(n, [&](int64_t i, int count) {
    store_count(dx + i, act_backward<kSquared>(load_count(dy + i, count), load_count(saved + i, count)), count);
  });
}
template <class T> void relu_backward(const void* dy, const void* saved, void* dx, int64_t n, bool squared) {
  auto run = squared ? relu_backward_of<T, true> : relu_backward_of<T, false>;
  run(static_cast<const T*>(dy), static_cast<const T*>(saved), static_cast<T*>(dx), n);
}

template <class T, bool kSquared> void bias_forward_of(const T* x, const T* bias, T* y, int64_t rows, int64_t cols) {
  for (int64_t r = 0; r < rows; ++r, x += cols, y += cols) {
    for_each_vector<vec_t<T>>(cols, [&](int64_t i, int count) {
      store_count(y + i, act<kSquared>(load_count(x + i, count) + load_count(bias + i, count)), count);
    });
  }
}
template <class T>
void bias_forward(const void* x, const void* bias, void* y, int64_t rows, int64_t cols, bool squared) {
  auto run = squared ? bias_forward_of<T, true> : bias_forward_of<T, false>;
  run(static_cast<const T*>(x), static_cast<const T*>(bias), static_cast<T*>(y), rows, cols);
}

template <class T, bool kSquared>
void bias_backward_of(const T* dy, const T* saved, const T* bias, T* dx, compute_t<T>* sums, int64_t rows, int64_t cols) {
  for (int64_t i = 0; i < cols; ++i) sums[i] = 0;
  for (int64_t r = 0; r < rows; ++r, dy += cols, saved += cols, dx += cols) {
    for_each_vector<vec_t<T>>(cols, [&](int64_t i, int count) {
      vec_t<T> at = load_count(saved + i, count);
      if constexpr (kSquared) at += load_count(bias + i, count);
      vec_t<T> d = act_backward<kSquared>(load_count(dy + i, count), at);
      store_count(dx + i, d, count);
      store_count(sums + i, load_count(sums + i, count) + d, count);
    });
  }
}
template <class T>
void bias_backward(const void* dy, const void* saved, const void* bias, void* dx, void* sums, int64_t rows, int64_t cols,
                   bool squared) {
  auto run = squared ? bias_backward_of<T, true> : bias_backward_of<T, false>;
  run(static_cast<const T*>(dy), static_cast<const T*>(saved), static_cast<const T*>(bias), static_cast<T*>(dx),
      static_cast<compute_t<T>*>(sums), rows, cols);
}

constexpr ReluKernels kReluKernels = {
    FASTLM_FOR_FLOATS(relu_forward),
    FASTLM_FOR_FLOATS(relu_backward),
    FASTLM_FOR_FLOATS(bias_forward),
    FASTLM_FOR_FLOATS(bias_backward),
};

}  // namespace
}  // namespace fastlm::cpu::FASTLM_ISA
