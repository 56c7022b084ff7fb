// Activations, alone, after a bias and in gated units: one pass over memory each.
#include <cstdint>

#include "activation.h"
#include "vec.h"

namespace fastlm::cpu::FASTLM_ISA {
namespace {

template <class V> inline V sigmoid(V x) { return splat<V>(1) / (splat<V>(1) + exp(-x)); }

// The normal distribution at x: its density and the probability below.
template <class V> struct Normal {
  V density, below;
};
inline Normal<f32v> normal(f32v x) {
  // The probability beyond |x| is exp(-x^2 / 2) R(|x|). In t = 1 / (1 + 0.33 |x|), R is nearly a polynomial: t P(t), fitted
  // on |x| <= 14 for the least relative error (5e-8); at 14.8 the exponential is 0.
  f32v u = min(splat<f32v>(14.8f), abs(x)), t = reciprocal(fma(u, splat<f32v>(0.33f), splat<f32v>(1)));
  f32v p = fma(splat<f32v>(-0x1.54e6e0p-6f), t, splat<f32v>(0x1.f81fe2p-4f));
  p = fma(p, t, splat<f32v>(-0x1.1197f6p-2f));
  p = fma(p, t, splat<f32v>(0x1.cc0886p-3f));
  p = fma(p, t, splat<f32v>(-0x1.cf0af4p-5f));
  p = fma(p, t, splat<f32v>(0x1.f2f794p-4f));
  p = fma(p, t, splat<f32v>(0x1.c6ed3ep-4f));
  p = fma(p, t, splat<f32v>(0x1.0ef4c0p-3f));
  p = fma(p, t, splat<f32v>(0x1.0d8fecp-3f));
  f32v e = exp_bounded(u * u * -0.5f), beyond = e * t * p;
  return {e * 0x1.988454p-2f /* 1 / sqrt(2 pi) */, x < 0.0f ? beyond : 1.0f - beyond};
}
inline Normal<f64v> normal(f64v x) {
  Normal<f64v> result;
  for (int i = 0; i < lanes_of<f64v>; ++i) {
    result.density[i] = 0x1.9884533d43651p-2 * std::exp(-0.5 * x[i] * x[i]);
    result.below[i] = 0.5 * std::erfc(-0x1.6a09e667f3bcdp-1 * x[i]);
  }
  return result;
}

// Each activation: its value, and its gradient from dy and what was saved.
template <Act kAct> struct Activation;

template <> struct Activation<Act::kNone> {
  static constexpr bool kSavesOutput = true;
  template <class V> static V value(V x) { return x; }
  template <class V> static V gradient(V dy, V) { return dy; }
};
template <> struct Activation<Act::kRelu> {
  static constexpr bool kSavesOutput = true;
  template <class V> static V value(V x) { return relu(x); }
  template <class V> static V gradient(V dy, V y) { return y <= V{} ? V{} : dy; }
};
template <> struct Activation<Act::kReluSquared> {
  static constexpr bool kSavesOutput = false;
  template <class V> static V value(V x) { return relu(x) * relu(x); }
  template <class V> static V gradient(V dy, V x) { return x <= V{} ? V{} : dy * (x + x); }
};
template <> struct Activation<Act::kGelu> {
  static constexpr bool kSavesOutput = false;
  template <class V> static V value(V x) { return x * normal(x).below; }
  template <class V> static V gradient(V dy, V x) {
    Normal<V> n = normal(x);
    return dy * fma(x, n.density, n.below);
  }
};
// 0.5 x (1 + tanh(u)) = x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3).
template <> struct Activation<Act::kGeluTanh> {
  static constexpr bool kSavesOutput = false;
  static constexpr double kTwo = 1.5957691216057308, kCube = 0.044715;  // 2 sqrt(2 / pi)
  template <class V> static V gate(V x) { return sigmoid(x * fma(x * x, splat<V>(kTwo * kCube), splat<V>(kTwo))); }
  template <class V> static V value(V x) { return x * gate(x); }
  template <class V> static V gradient(V dy, V x) {
    V s = gate(x), slope = x * fma(x * x, splat<V>(3 * kTwo * kCube), splat<V>(kTwo));
    return dy * fma(s * (splat<V>(1) - s), slope, s);
  }
};
template <> struct Activation<Act::kSilu> {
  static constexpr bool kSavesOutput = false;
  template <class V> static V value(V x) { return x / (splat<V>(1) + exp(-x)); }
  template <class V> static V gradient(V dy, V x) {
    V s = sigmoid(x);
    return dy * s * fma(x, splat<V>(1) - s, splat<V>(1));
  }
};
template <> struct Activation<Act::kSigmoid> {
  static constexpr bool kSavesOutput = true;
  template <class V> static V value(V x) { return sigmoid(x); }
  template <class V> static V gradient(V dy, V y) { return dy * (splat<V>(1) - y) * y; }
};
template <> struct Activation<Act::kTanh> {
  static constexpr bool kSavesOutput = true;
  template <class V> static V value(V x) { return tanh(x); }
  template <class V> static V gradient(V dy, V y) { return dy * (splat<V>(1) - y * y); }
};

template <class T, Act kAct> struct ActivationOf {
  using A = Activation<kAct>;
  using V = vec_t<T>;

  static void forward(const void* x, void* y, int64_t n, bool past_caches) {
    const Output out(past_caches);
    const T* from = static_cast<const T*>(x);
    T* to = static_cast<T*>(y);
    for_each_vector<V>(n, [&](int64_t i, int count) { out.store_count(to + i, A::value(load_count(from + i, count)), count); });
  }

  static void backward(const void* dy_, const void* saved_, void* dx_, int64_t n, bool past_caches) {
    const Output out(past_caches);
    const T *dy = static_cast<const T*>(dy_), *saved = static_cast<const T*>(saved_);
    T* dx = static_cast<T*>(dx_);
    for_each_vector<V>(n, [&](int64_t i, int count) {
      out.store_count(dx + i, A::gradient(load_count(dy + i, count), load_count(saved + i, count)), count);
    });
  }

  static void bias_forward(const void* x_, const void* bias_, void* y_, int64_t rows, int64_t cols, bool past_caches) {
    const Output out(past_caches);
    const T *x = static_cast<const T*>(x_), *bias = static_cast<const T*>(bias_);
    T* y = static_cast<T*>(y_);
    for (int64_t r = 0; r < rows; ++r, x += cols, y += cols) {
      for_each_vector<V>(cols, [&](int64_t i, int count) {
        out.store_count(y + i, A::value(load_count(x + i, count) + load_count(bias + i, count)), count);
      });
    }
  }

  // Of kRows rows at once, whose part of the column sums is added up in registers.
  template <int kRows>
  static void bias_backward_rows(const T* dy, const T* saved, const T* bias, T* dx, compute_t<T>* sums, int64_t cols,
                                 const Output& out) {
    for_each_vector<V>(cols, [&](int64_t i, int count) {
      V sum = load_count(sums + i, count);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        V at = load_count(saved + r * cols + i, count);
        if (!A::kSavesOutput && bias != nullptr) at += load_count(bias + i, count);
        V d = A::gradient(load_count(dy + r * cols + i, count), at);
        out.store_count(dx + r * cols + i, d, count);
        sum += d;
      }
      store_count(sums + i, sum, count);
    });
  }

  static void bias_backward(const void* dy_, const void* saved_, const void* bias_, void* dx_, void* column_sums,
                            int64_t rows, int64_t cols, bool past_caches) {
    const Output out(past_caches);
    const T *dy = static_cast<const T*>(dy_), *saved = static_cast<const T*>(saved_), *bias = static_cast<const T*>(bias_);
    T* dx = static_cast<T*>(dx_);
    compute_t<T>* sums = static_cast<compute_t<T>*>(column_sums);
    for (int64_t i = 0; i < cols; ++i) sums[i] = 0;
    constexpr int kRows = 4;
    int64_t r = 0;
    for (; r + kRows <= rows; r += kRows) {
      bias_backward_rows<kRows>(dy + r * cols, saved + r * cols, bias, dx + r * cols, sums, cols, out);
    }
    for (; r < rows; ++r) bias_backward_rows<1>(dy + r * cols, saved + r * cols, bias, dx + r * cols, sums, cols, out);
  }

  static void glu_forward(const void* gate_, const void* up_, void* y_, int64_t rows, int64_t cols, int64_t gate_row,
                          int64_t up_row, bool past_caches) {
    const Output out(past_caches);
    const T *gate = static_cast<const T*>(gate_), *up = static_cast<const T*>(up_);
    T* y = static_cast<T*>(y_);
    for (int64_t r = 0; r < rows; ++r, gate += gate_row, up += up_row, y += cols) {
      for_each_vector<V>(cols, [&](int64_t i, int count) {
        out.store_count(y + i, A::value(load_count(gate + i, count)) * load_count(up + i, count), count);
      });
    }
  }

  static void glu_backward(const void* dy_, const void* gate_, const void* up_, void* dgate_, void* dup_, int64_t rows,
                           int64_t cols, int64_t gate_row, int64_t up_row, bool past_caches) {
    const Output out(past_caches);
    const T *dy = static_cast<const T*>(dy_), *gate = static_cast<const T*>(gate_), *up = static_cast<const T*>(up_);
    T *dgate = static_cast<T*>(dgate_), *dup = static_cast<T*>(dup_);
    for (int64_t r = 0; r < rows; ++r, dy += cols, gate += gate_row, up += up_row, dgate += cols, dup += cols) {
      for_each_vector<V>(cols, [&](int64_t i, int count) {
        V d = load_count(dy + i, count), x = load_count(gate + i, count), value = A::value(x);
        out.store_count(dgate + i, A::gradient(d * load_count(up + i, count), A::kSavesOutput ? value : x), count);
        out.store_count(dup + i, d * value, count);
      });
    }
  }
};

template <Act kAct> struct KernelsOf {
  template <class T>
  static constexpr ActivationKernels::OfDType kernels = {
      ActivationOf<T, kAct>::forward,       ActivationOf<T, kAct>::backward,    ActivationOf<T, kAct>::bias_forward,
      ActivationOf<T, kAct>::bias_backward, ActivationOf<T, kAct>::glu_forward, ActivationOf<T, kAct>::glu_backward,
  };
};
constexpr ActivationKernels kActivationKernels = {{
    FASTLM_FOR_FLOATS(KernelsOf<Act::kNone>::kernels),        FASTLM_FOR_FLOATS(KernelsOf<Act::kRelu>::kernels),
    FASTLM_FOR_FLOATS(KernelsOf<Act::kReluSquared>::kernels), FASTLM_FOR_FLOATS(KernelsOf<Act::kGelu>::kernels),
    FASTLM_FOR_FLOATS(KernelsOf<Act::kGeluTanh>::kernels),    FASTLM_FOR_FLOATS(KernelsOf<Act::kSilu>::kernels),
    FASTLM_FOR_FLOATS(KernelsOf<Act::kSigmoid>::kernels),     FASTLM_FOR_FLOATS(KernelsOf<Act::kTanh>::kernels),
}};

}  // namespace
}  // namespace fastlm::cpu::FASTLM_ISA
