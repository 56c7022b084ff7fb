// relu, squared relu and both after a bias: one pass over memory each. NaN stays NaN and passes its gradient.
#include "relu.h"

#include "common.cuh"

namespace fastlm::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 4;  // independent 16-byte loads in flight per thread and tensor

// Rows of a matrix are read by blocks of kLanesX x kLanesY threads, each thread one vector of columns.
constexpr int kLanesX = 32;
constexpr int kLanesY = kThreads / kLanesX;
// Column sums run in float within a chunk of rows and in double across chunks. The chunk depends on nothing, so neither
// does the result. 128 rows give 384 blocks at (4096, 3072) in bf16.
constexpr int kRowChunk = 128;

template <bool kSquared, class C> __device__ C act(C x) {
  C r = x <= 0 ? C(0) : x;
  return kSquared ? r * r : r;
}

template <bool kSquared, class C> __device__ C act_backward(C dy, C saved) {
  return saved <= 0 ? C(0) : (kSquared ? dy * (saved + saved) : dy);
}

// --- elementwise ------------------------------------------------------------------------------------------------------
template <class T, bool kSquared>
__global__ void __launch_bounds__(kThreads) relu_fwd_kernel(const T* x, T* y, int64_t n, bool aligned) {
  using C = compute_t<T>;
  int64_t first = (int64_t(blockIdx.x) * kUnroll * kThreads + threadIdx.x) * kVector<T>;
  Vector<T> v[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    int64_t i = first + int64_t(u) * kThreads * kVector<T>;
    if (i < n) v[u] = load_count(x + i, n - i, aligned);
  }
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    int64_t i = first + int64_t(u) * kThreads * kVector<T>;
    if (i >= n) break;
#pragma unroll
    for (int e = 0; e < kVector<T>; ++e) v[u].at[e] = narrow<T>(act<kSquared>(C(widen(v[u].at[e]))));
    store_count(y + i, v[u], n - i, aligned);
  }
}

template <class T, bool kSquared>
__global__ void __launch_bounds__(kThreads)
    relu_bwd_kernel(const T* dy, const T* saved, T* dx, int64_t n, bool aligned) {
  using C = compute_t<T>;
  int64_t first = (int64_t(blockIdx.x) * kUnroll * kThreads + threadIdx.x) * kVector<T>;
  Vector<T> d[kUnroll], s[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    int64_t i = first + int64_t(u) * kThreads * kVector<T>;
    if (i < n) {
      d[u] = load_count(dy + i, n - i, aligned);
      s[u] = load_count(saved + i, n - i, aligned);
    }
  }
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    int64_t i = first + int64_t(u) * kThreads * kVector<T>;
    if (i >= n) break;
#pragma unroll
    for (int e = 0; e < kVector<T>; ++e) {
      d[u].at[e] = narrow<T>(act_backward<kSquared>(C(widen(d[u].at[e])), C(widen(s[u].at[e]))));
    }
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

template <class T, bool kSquared>
__global__ void __launch_bounds__(kThreads)
    bias_act_fwd_kernel(const T* x, const T* bias, T* y, int64_t rows, int64_t cols, int64_t column_blocks, bool aligned) {
  using C = compute_t<T>;
  Place<T> at(rows, column_blocks);
  int64_t count = cols - at.col;
  if (count <= 0) return;
  Vector<T> b = load_count(bias + at.col, count, aligned);
#pragma unroll 4
  for (int64_t row = at.row; row < at.row_end; row += kLanesY) {
    Vector<T> v = load_count(x + row * cols + at.col, count, aligned);
#pragma unroll
    for (int e = 0; e < kVector<T>; ++e) v.at[e] = narrow<T>(act<kSquared>(C(widen(v.at[e])) + C(widen(b.at[e]))));
    store_count(y + row * cols + at.col, v, count, aligned);
  }
}

template <class T, bool kSquared>
__global__ void __launch_bounds__(kThreads)
    bias_act_bwd_kernel(const T* dy, const T* saved, const T* bias, T* dx, compute_t<T>* partial, int64_t rows,
                        int64_t cols, int64_t column_blocks, bool aligned) {
  using C = compute_t<T>;
  __shared__ C sums[kLanesY][kLanesX * kVector<T>];
  Place<T> at(rows, column_blocks);
  int64_t count = cols - at.col;
  Vector<T> b = load_count(bias + at.col, kSquared ? count : 0, aligned);
  C sum[kVector<T>] = {};
#pragma unroll 2
  for (int64_t row = at.row; row < (count > 0 ? at.row_end : 0); row += kLanesY) {
    Vector<T> d = load_count(dy + row * cols + at.col, count, aligned);
    Vector<T> s = load_count(saved + row * cols + at.col, count, aligned);
#pragma unroll
    for (int e = 0; e < kVector<T>; ++e) {
      C g = act_backward<kSquared>(C(widen(d.at[e])), C(widen(s.at[e])) + (kSquared ? C(widen(b.at[e])) : C(0)));
      sum[e] += g;
      d.at[e] = narrow<T>(g);
    }
    store_count(dx + row * cols + at.col, d, count, aligned);
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

// out[c] = sum over chunks of partial[chunk, c], in double
template <class C>
__global__ void __launch_bounds__(kThreads) column_sum_kernel(const C* partial, C* out, int64_t chunks, int64_t cols) {
  __shared__ double sums[kLanesY][kLanesX];
  int x = threadIdx.x % kLanesX, y = threadIdx.x / kLanesX;
  int64_t col = int64_t(blockIdx.x) * kLanesX + x;
  double sum = 0;
  for (int64_t i = y; i < (col < cols ? chunks : 0); i += kLanesY) sum += partial[i * cols + col];
  sums[y][x] = sum;
  __syncthreads();
  if (y != 0 || col >= cols) return;
  for (int i = 1; i < kLanesY; ++i) sum += sums[i][x];
  out[col] = static_cast<C>(sum);
}

template <class T> int64_t column_blocks_of(int64_t cols) { return ceil_div(cols, kLanesX * kVector<T>); }

}  // namespace

int64_t bias_act_chunks(int64_t rows) { return ceil_div(rows, kRowChunk); }

void relu_forward(const Target& target, DType dtype, const void* x, void* y, int64_t n, bool squared) {
  dispatch_float(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    launch(target, "relu", squared ? relu_fwd_kernel<T, true> : relu_fwd_kernel<T, false>,
           grid_of(ceil_div(n, kThreads * kUnroll * kVector<T>)), kThreads, 0, static_cast<const T*>(x),
           static_cast<T*>(y), n, aligned16(x) && aligned16(y));
  });
}

void relu_backward(const Target& target, DType dtype, const void* dy, const void* saved, void* dx, int64_t n,
                   bool squared) {
  dispatch_float(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    launch(target, "relu_backward", squared ? relu_bwd_kernel<T, true> : relu_bwd_kernel<T, false>,
           grid_of(ceil_div(n, kThreads * kUnroll * kVector<T>)), kThreads, 0, static_cast<const T*>(dy),
           static_cast<const T*>(saved), static_cast<T*>(dx), n, aligned16(dy) && aligned16(saved) && aligned16(dx));
  });
}

void bias_act_forward(const Target& target, DType dtype, const void* x, const void* bias, void* y, int64_t rows,
                      int64_t cols, bool squared) {
  dispatch_float(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    bool aligned = aligned16(x) && aligned16(bias) && aligned16(y) && cols % kVector<T> == 0;
    launch(target, "bias_act", squared ? bias_act_fwd_kernel<T, true> : bias_act_fwd_kernel<T, false>,
           grid_of(column_blocks_of<T>(cols) * bias_act_chunks(rows)), kThreads, 0, static_cast<const T*>(x),
           static_cast<const T*>(bias), static_cast<T*>(y), rows, cols, column_blocks_of<T>(cols), aligned);
  });
}

void bias_act_backward(const Target& target, DType dtype, const void* dy, const void* saved, const void* bias, void* dx,
                       void* dbias, void* partial, int64_t rows, int64_t cols, bool squared) {
  dispatch_float(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using C = compute_t<T>;
    bool aligned = aligned16(dy) && aligned16(saved) && aligned16(bias) && aligned16(dx) && cols % kVector<T> == 0;
    launch(target, "bias_act_backward", squared ? bias_act_bwd_kernel<T, true> : bias_act_bwd_kernel<T, false>,
           grid_of(column_blocks_of<T>(cols) * bias_act_chunks(rows)), kThreads, 0, static_cast<const T*>(dy),
           static_cast<const T*>(saved), static_cast<const T*>(bias), static_cast<T*>(dx), static_cast<C*>(partial), rows,
           cols, column_blocks_of<T>(cols), aligned);
    launch(target, "bias_act_backward", column_sum_kernel<C>, grid_of(ceil_div(cols, kLanesX)), kThreads, 0,
           static_cast<const C*>(partial), static_cast<C*>(dbias), bias_act_chunks(rows), cols);
  });
}

}  // namespace fastlm::cuda
