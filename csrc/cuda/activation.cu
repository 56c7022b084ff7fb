// Activations, alone, after a bias and in gated units: one pass over memory each. NaN stays NaN.
//
// The activation is an argument: a kernel loads what it works on, branches once on the activation, all threads alike, and
// stores, so that there are as many kernels as operations and types.
#include "activation.h"

#include "column_sums.cuh"
#include "../host_device.h"

namespace fastlm::cuda {
namespace {

constexpr int kThreads = 256;
// Independent 16-byte loads in flight per thread of an elementwise kernel, half as many of each tensor in the others.
constexpr int kUnroll = 4;
// Blocks that a multiprocessor holds at once, which leaves a thread 80 registers. float64 is there for checks, not for speed.
template <class T> constexpr int kBlocks = sizeof(T) == 8 ? 1 : 3;

// Rows of a matrix are read by blocks of kLanesX x kLanesY threads, each thread one vector of columns.
constexpr int kLanesX = 32;
constexpr int kLanesY = kThreads / kLanesX;
// Column sums run in float within a chunk of rows and in double across chunks. The chunk depends on nothing, so neither
// does the result. 128 rows give 384 blocks at (4096, 3072) in bf16.
constexpr int kRowChunk = 128;

// --- formulas ---------------------------------------------------------------------------------------------------------
__device__ float exponential(float x) { return expf(x); }
__device__ double exponential(double x) { return exp(x); }
__device__ float error_function(float x) { return erff(x); }
__device__ double error_function(double x) { return erf(x); }
__device__ float hyperbolic_tangent(float x) { return tanhf(x); }
__device__ double hyperbolic_tangent(double x) { return tanh(x); }

// s = sigmoid(x), and 1 - s. From exp(-|x|), so that neither loses digits where it is small.
template <class C> struct Sigmoid {
  C s, rest;
  __device__ explicit Sigmoid(C x) {
    C t = exponential(-fabs(x)), more = reciprocal(1 + t), less = t * more;
    s = x < 0 ? less : more;
    rest = x < 0 ? more : less;
  }
};
// The normal distribution's probability below x.
template <class C> __device__ C normal(C x) { return C(0.5) * (1 + error_function(x * C(0.7071067811865476))); }

// Whether gradients are computed from an activation's output, and not from its input.
FASTLM_HOST_DEVICE constexpr bool saves_output(Act act) {
  return act == Act::kNone || act == Act::kRelu || act == Act::kSigmoid || act == Act::kTanh;
}

// Each activation: its value, and its gradient from dy and what was saved.
template <Act kAct> struct Activation;

template <> struct Activation<Act::kNone> {
  template <class C> static __device__ C value(C x) { return x; }
  template <class C> static __device__ C gradient(C dy, C) { return dy; }
};
template <> struct Activation<Act::kRelu> {
  template <class C> static __device__ C value(C x) { return x <= 0 ? C(0) : x; }
  template <class C> static __device__ C gradient(C dy, C y) { return y <= 0 ? C(0) : dy; }
};
template <> struct Activation<Act::kReluSquared> {
  template <class C> static __device__ C value(C x) { return x <= 0 ? C(0) : x * x; }
  template <class C> static __device__ C gradient(C dy, C x) { return x <= 0 ? C(0) : dy * (x + x); }
};
template <> struct Activation<Act::kGelu> {
  template <class C> static __device__ C value(C x) { return x * normal(x); }
  template <class C> static __device__ C gradient(C dy, C x) {
    C density = C(0.3989422804014327) * exponential(C(-0.5) * x * x);
    return dy * (normal(x) + x * density);
  }
};
// 0.5 x (1 + tanh(u)) = x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3).
template <> struct Activation<Act::kGeluTanh> {
  static constexpr double kTwo = 1.5957691216057308, kCube = 0.044715;  // 2 sqrt(2 / pi)
  template <class C> static __device__ Sigmoid<C> gate(C x) { return Sigmoid<C>(x * (C(kTwo) + C(kTwo * kCube) * (x * x))); }
  template <class C> static __device__ C value(C x) { return x * gate(x).s; }
  template <class C> static __device__ C gradient(C dy, C x) {
    Sigmoid<C> g = gate(x);
    // In this order: where s (1 - s) is 0, x^3 may be infinite.
    return dy * (g.s + g.s * g.rest * x * (C(kTwo) + C(3 * kTwo * kCube) * (x * x)));
  }
};
template <> struct Activation<Act::kSilu> {
  template <class C> static __device__ C value(C x) { return x * Sigmoid<C>(x).s; }
  template <class C> static __device__ C gradient(C dy, C x) {
    Sigmoid<C> g(x);
    return dy * g.s * (1 + x * g.rest);
  }
};
template <> struct Activation<Act::kSigmoid> {
  template <class C> static __device__ C value(C x) { return Sigmoid<C>(x).s; }
  template <class C> static __device__ C gradient(C dy, C y) { return dy * (1 - y) * y; }
};
template <> struct Activation<Act::kTanh> {
  template <class C> static __device__ C value(C x) { return hyperbolic_tangent(x); }
  template <class C> static __device__ C gradient(C dy, C y) { return dy * (1 - y * y); }
};

template <Act kAct> struct ActTag { static constexpr Act value = kAct; };

// Calls run(ActTag<act>{}).
template <class Run> __device__ void with_act(Act act, const Run& run) {
  switch (act) {
    case Act::kNone: return run(ActTag<Act::kNone>{});
    case Act::kRelu: return run(ActTag<Act::kRelu>{});
    case Act::kReluSquared: return run(ActTag<Act::kReluSquared>{});
    case Act::kGelu: return run(ActTag<Act::kGelu>{});
    case Act::kGeluTanh: return run(ActTag<Act::kGeluTanh>{});
    case Act::kSilu: return run(ActTag<Act::kSilu>{});
    case Act::kSigmoid: return run(ActTag<Act::kSigmoid>{});
    case Act::kTanh: return run(ActTag<Act::kTanh>{});
  }
}

// --- elementwise ------------------------------------------------------------------------------------------------------
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks<T>) act_fwd_kernel(Act act, const T* x, T* y, int64_t n, bool aligned) {
  using C = compute_t<T>;
  int64_t first = (int64_t(blockIdx.x) * kUnroll * kThreads + threadIdx.x) * kVector<T>;
  Vector<T> v[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    int64_t i = first + int64_t(u) * kThreads * kVector<T>;
    v[u] = load_count(x + i, n - i, aligned);
  }
  with_act(act, [&](auto tag) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
      for (int e = 0; e < kVector<T>; ++e) v[u].at[e] = narrow<T>(Activation<decltype(tag)::value>::value(C(widen(v[u].at[e]))));
    }
  });
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    int64_t i = first + int64_t(u) * kThreads * kVector<T>;
    store_count(y + i, v[u], n - i, aligned);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    act_bwd_kernel(Act act, const T* dy, const T* saved, T* dx, int64_t n, bool aligned) {
  using C = compute_t<T>;
  constexpr int kVectors = kUnroll / 2;
  int64_t first = (int64_t(blockIdx.x) * kVectors * kThreads + threadIdx.x) * kVector<T>;
  Vector<T> d[kVectors], s[kVectors];
#pragma unroll
  for (int u = 0; u < kVectors; ++u) {
    int64_t i = first + int64_t(u) * kThreads * kVector<T>;
    d[u] = load_count(dy + i, n - i, aligned);
    s[u] = load_count(saved + i, n - i, aligned);
  }
  with_act(act, [&](auto tag) {
#pragma unroll
    for (int u = 0; u < kVectors; ++u) {
#pragma unroll
      for (int e = 0; e < kVector<T>; ++e) {
        d[u].at[e] = narrow<T>(Activation<decltype(tag)::value>::gradient(C(widen(d[u].at[e])), C(widen(s[u].at[e]))));
      }
    }
  });
#pragma unroll
  for (int u = 0; u < kVectors; ++u) {
    int64_t i = first + int64_t(u) * kThreads * kVector<T>;
    store_count(dx + i, d[u], n - i, aligned);
  }
}

// --- after a bias -----------------------------------------------------------------------------------------------------
// Block b works on columns of block b % column_blocks and on the chunk of rows b / column_blocks.
template <class T> struct Place {
  int64_t col, row, row_end;
  __device__ Place(int64_t rows, int64_t column_blocks) {
    int64_t block = blockIdx.x;
    col = ((block % column_blocks) * kLanesX + threadIdx.x % kLanesX) * kVector<T>;
    row = (block / column_blocks) * kRowChunk + threadIdx.x / kLanesX;
    row_end = (block / column_blocks + 1) * kRowChunk;
    if (row_end > rows) row_end = rows;
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    bias_act_fwd_kernel(Act act, const T* x, const T* bias, T* y, int64_t rows, int64_t cols, int64_t column_blocks,
                        bool aligned) {
  using C = compute_t<T>;
  constexpr int kRows = kUnroll / 2;
  Place<T> at(rows, column_blocks);
  int64_t count = cols - at.col;
  if (count <= 0) return;
  Vector<T> b = load_count(bias + at.col, count, aligned);
  for (int64_t row = at.row; row < at.row_end; row += kRows * kLanesY) {
    Vector<T> v[kRows];
#pragma unroll
    for (int u = 0; u < kRows; ++u) {
      int64_t r = row + u * kLanesY;
      v[u] = load_count(x + r * cols + at.col, r < at.row_end ? count : 0, aligned);
    }
    with_act(act, [&](auto tag) {
#pragma unroll
      for (int u = 0; u < kRows; ++u) {
#pragma unroll
        for (int e = 0; e < kVector<T>; ++e) {
          v[u].at[e] = narrow<T>(Activation<decltype(tag)::value>::value(C(widen(v[u].at[e])) + C(widen(b.at[e]))));
        }
      }
    });
#pragma unroll
    for (int u = 0; u < kRows; ++u) {
      int64_t r = row + u * kLanesY;
      store_count(y + r * cols + at.col, v[u], r < at.row_end ? count : 0, aligned);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    bias_act_bwd_kernel(Act act, const T* dy, const T* saved, const T* bias, T* dx, compute_t<T>* partial, int64_t rows,
                        int64_t cols, int64_t column_blocks, bool aligned) {
  using C = compute_t<T>;
  constexpr int kRows = sizeof(T) == 8 ? 1 : kUnroll / 2;
  __shared__ C sums[kLanesY][kLanesX * kVector<T>];
  Place<T> at(rows, column_blocks);
  int64_t count = cols - at.col;
  // Where the output was saved it may hold anything.
  Vector<T> b = load_count(bias + at.col, bias == nullptr || saves_output(act) ? 0 : count, aligned);
  C sum[kVector<T>] = {};
  for (int64_t row = at.row; row < (count > 0 ? at.row_end : 0); row += kRows * kLanesY) {
    Vector<T> d[kRows], s[kRows];
#pragma unroll
    for (int u = 0; u < kRows; ++u) {
      int64_t r = row + u * kLanesY;
      d[u] = load_count(dy + r * cols + at.col, r < at.row_end ? count : 0, aligned);
      s[u] = load_count(saved + r * cols + at.col, r < at.row_end ? count : 0, aligned);
    }
    with_act(act, [&](auto tag) {
#pragma unroll
      for (int u = 0; u < kRows; ++u) {
#pragma unroll
        for (int e = 0; e < kVector<T>; ++e) {
          C at_e = C(widen(s[u].at[e])) + C(widen(b.at[e]));
          C g = Activation<decltype(tag)::value>::gradient(C(widen(d[u].at[e])), at_e);
          if (row + u * kLanesY < at.row_end) sum[e] += g;
          d[u].at[e] = narrow<T>(g);
        }
      }
    });
#pragma unroll
    for (int u = 0; u < kRows; ++u) {
      int64_t r = row + u * kLanesY;
      store_count(dx + r * cols + at.col, d[u], r < at.row_end ? count : 0, aligned);
    }
  }
#pragma unroll
  for (int e = 0; e < kVector<T>; ++e) {
    sums[threadIdx.x / kLanesX][threadIdx.x % kLanesX * kVector<T> + e] = sum[e];
  }
  __syncthreads();
  int64_t chunk = blockIdx.x / column_blocks, first = blockIdx.x % column_blocks * kLanesX * kVector<T>;
  for (int i = threadIdx.x; i < kLanesX * kVector<T> && first + i < cols; i += kThreads) {
    C total = 0;
    for (int y = 0; y < kLanesY; ++y) total += sums[y][i];
    partial[chunk * cols + first + i] = total;
  }
}

// --- gated units ------------------------------------------------------------------------------------------------------
// Where the rows of a matrix lie that threads walk through vector by vector, a block's next to each other.
struct Steps {
  int64_t rows, cols, gate_row, up_row;
  int64_t vectors;               // of a row, the last one maybe not whole
  int64_t step_rows, step_cols;  // kThreads vectors on: so many rows, and vectors of the next
};

struct Walk {
  int64_t row, vector;
  __device__ Walk(const Steps& s, int unroll) {
    int64_t i = int64_t(blockIdx.x) * unroll * kThreads + threadIdx.x;
    row = i / s.vectors;
    vector = i - row * s.vectors;
  }
  __device__ void next(const Steps& s) {
    row += s.step_rows;
    vector += s.step_cols;
    if (vector >= s.vectors) {
      vector -= s.vectors;
      ++row;
    }
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    glu_fwd_kernel(Act act, const T* gate, const T* up, T* y, Steps steps, bool aligned) {
  using C = compute_t<T>;
  constexpr int kVectors = kUnroll / 2;
  Vector<T> g[kVectors], v[kVectors];
  int64_t to[kVectors], count[kVectors];
  Walk at(steps, kVectors);
#pragma unroll
  for (int u = 0; u < kVectors; ++u, at.next(steps)) {
    int64_t col = at.vector * kVector<T>;
    to[u] = at.row * steps.cols + col;
    count[u] = at.row < steps.rows ? steps.cols - col : 0;
    g[u] = load_count(gate + at.row * steps.gate_row + col, count[u], aligned);
    v[u] = load_count(up + at.row * steps.up_row + col, count[u], aligned);
  }
  with_act(act, [&](auto tag) {
#pragma unroll
    for (int u = 0; u < kVectors; ++u) {
#pragma unroll
      for (int e = 0; e < kVector<T>; ++e) {
        v[u].at[e] = narrow<T>(Activation<decltype(tag)::value>::value(C(widen(g[u].at[e]))) * C(widen(v[u].at[e])));
      }
    }
  });
#pragma unroll
  for (int u = 0; u < kVectors; ++u) store_count(y + to[u], v[u], count[u], aligned);
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    glu_bwd_kernel(Act act, const T* dy, const T* gate, const T* up, T* dgate, T* dup, Steps steps, bool aligned) {
  using C = compute_t<T>;
  constexpr int kVectors = kUnroll / 2;
  Vector<T> d[kVectors], g[kVectors], v[kVectors];
  int64_t to[kVectors], count[kVectors];
  Walk at(steps, kVectors);
#pragma unroll
  for (int u = 0; u < kVectors; ++u, at.next(steps)) {
    int64_t col = at.vector * kVector<T>;
    to[u] = at.row * steps.cols + col;
    count[u] = at.row < steps.rows ? steps.cols - col : 0;
    d[u] = load_count(dy + to[u], count[u], aligned);
    g[u] = load_count(gate + at.row * steps.gate_row + col, count[u], aligned);
    v[u] = load_count(up + at.row * steps.up_row + col, count[u], aligned);
  }
  with_act(act, [&](auto tag) {
    constexpr Act kAct = decltype(tag)::value;
#pragma unroll
    for (int u = 0; u < kVectors; ++u) {
#pragma unroll
      for (int e = 0; e < kVector<T>; ++e) {
        C dy_e = C(widen(d[u].at[e])), x = C(widen(g[u].at[e])), value = Activation<kAct>::value(x);
        C dx = Activation<kAct>::gradient(dy_e * C(widen(v[u].at[e])), saves_output(kAct) ? value : x);
        g[u].at[e] = narrow<T>(dx);
        v[u].at[e] = narrow<T>(dy_e * value);
      }
    }
  });
#pragma unroll
  for (int u = 0; u < kVectors; ++u) {
    store_count(dgate + to[u], g[u], count[u], aligned);
    store_count(dup + to[u], v[u], count[u], aligned);
  }
}

// --- launchers --------------------------------------------------------------------------------------------------------
template <class T> int64_t column_blocks_of(int64_t cols) { return ceil_div(cols, kLanesX * kVector<T>); }

template <class T> Steps steps_of(int64_t rows, int64_t cols, int64_t gate_row, int64_t up_row) {
  if (gate_row == cols && up_row == cols) cols *= rows, rows = 1;
  int64_t vectors = std::max<int64_t>(1, ceil_div(cols, kVector<T>));
  return {rows, cols, gate_row, up_row, vectors, kThreads / vectors, kThreads % vectors};
}

// Whether every row begins at a multiple of 16 bytes, if the first ones do.
template <class T> bool rows_aligned(const Steps& s) {
  return s.rows <= 1 || (s.cols % kVector<T> == 0 && s.gate_row % kVector<T> == 0 && s.up_row % kVector<T> == 0);
}

inline dim3 blocks_of(const Steps& s) {
  return grid_of(s.cols == 0 ? 0 : ceil_div(s.rows * s.vectors, kThreads * (kUnroll / 2)));
}

}  // namespace

int64_t bias_act_chunks(int64_t rows) { return ceil_div(rows, kRowChunk); }

void act_forward(const Target& target, Act act, DType dtype, const void* x, void* y, int64_t n) {
  dispatch_float(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    launch(target, "act_forward", act_fwd_kernel<T>, grid_of(ceil_div(n, kThreads * kUnroll * kVector<T>)), kThreads, 0,
           act, static_cast<const T*>(x), static_cast<T*>(y), n, aligned16(x) && aligned16(y));
  });
}

void act_backward(const Target& target, Act act, DType dtype, const void* dy, const void* saved, void* dx, int64_t n) {
  dispatch_float(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    launch(target, "act_backward", act_bwd_kernel<T>, grid_of(ceil_div(n, kThreads * (kUnroll / 2) * kVector<T>)), kThreads,
           0, act, static_cast<const T*>(dy), static_cast<const T*>(saved), static_cast<T*>(dx), n,
           aligned16(dy) && aligned16(saved) && aligned16(dx));
  });
}

void bias_act_forward(const Target& target, Act act, DType dtype, const void* x, const void* bias, void* y, int64_t rows,
                      int64_t cols) {
  dispatch_float(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    bool aligned = aligned16(x) && aligned16(bias) && aligned16(y) && cols % kVector<T> == 0;
    launch(target, "bias_act", bias_act_fwd_kernel<T>, grid_of(column_blocks_of<T>(cols) * bias_act_chunks(rows)),
           kThreads, 0, act, static_cast<const T*>(x), static_cast<const T*>(bias), static_cast<T*>(y), rows, cols,
           column_blocks_of<T>(cols), aligned);
  });
}

void bias_act_backward(const Target& target, Act act, DType dtype, const void* dy, const void* saved, const void* bias,
                       void* dx, void* dbias, void* partial, int64_t rows, int64_t cols) {
  dispatch_float(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using C = compute_t<T>;
    bool aligned = aligned16(dy) && aligned16(saved) && aligned16(bias) && aligned16(dx) && cols % kVector<T> == 0;
    launch(target, "bias_act_backward", bias_act_bwd_kernel<T>,
           grid_of(column_blocks_of<T>(cols) * bias_act_chunks(rows)), kThreads, 0, act, static_cast<const T*>(dy),
           static_cast<const T*>(saved), static_cast<const T*>(bias), static_cast<T*>(dx), static_cast<C*>(partial), rows,
           cols, column_blocks_of<T>(cols), aligned);
    sum_columns<C>(target, "bias_act_backward", static_cast<const C*>(partial), static_cast<C*>(dbias), bias_act_chunks(rows), cols);
  });
}

void glu_forward(const Target& target, Act act, DType dtype, const void* gate, const void* up, void* y, int64_t rows,
                 int64_t cols, int64_t gate_row, int64_t up_row) {
  dispatch_float(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    Steps steps = steps_of<T>(rows, cols, gate_row, up_row);
    bool aligned = aligned16(gate) && aligned16(up) && aligned16(y) && rows_aligned<T>(steps);
    launch(target, "glu", glu_fwd_kernel<T>, blocks_of(steps), kThreads, 0, act, static_cast<const T*>(gate),
           static_cast<const T*>(up), static_cast<T*>(y), steps, aligned);
  });
}

void glu_backward(const Target& target, Act act, DType dtype, const void* dy, const void* gate, const void* up, void* dgate,
                  void* dup, int64_t rows, int64_t cols, int64_t gate_row, int64_t up_row) {
  dispatch_float(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    Steps steps = steps_of<T>(rows, cols, gate_row, up_row);
    bool aligned = aligned16(dy) && aligned16(gate) && aligned16(up) && aligned16(dgate) && aligned16(dup) &&
                   rows_aligned<T>(steps);
    launch(target, "glu_backward", glu_bwd_kernel<T>, blocks_of(steps), kThreads, 0, act, static_cast<const T*>(dy),
           static_cast<const T*>(gate), static_cast<const T*>(up), static_cast<T*>(dgate), static_cast<T*>(dup), steps,
           aligned);
  });
}

}  // namespace fastlm::cuda
