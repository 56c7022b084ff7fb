// Layer norm and RMS norm, with the residual added first where there is one: a row is read once and stays in the registers of as
// many threads as it takes, from a warp to a block; a row too long for that is read again, from the L2 cache.
#include "norm.h"

#include "column_sums.cuh"

namespace fastlm::cuda {
namespace {

constexpr int kThreads = 512;
// 16-byte vectors of a row that a thread keeps: 16 elements, or 8 doubles. With more, the backward in 16 bits takes 240
// registers, and too few loads are under way.
template <class T> constexpr int kHeld = sizeof(T) == 8 ? 4 : 16 / kVector<T>;

// --- rows -------------------------------------------------------------------------------------------------------------
// A row is for a group of kGroup threads, of which each has every kGroup-th vector. kKept: whether they stay in registers.
template <class T, int kGroup, bool kKept> struct Row {
  using C = compute_t<T>;
  static constexpr int kVectors = kKept ? kHeld<T> : 1;
  static constexpr int kGroups = kThreads / kGroup;
  int64_t cols;  // 0 where the group has no row and only waits with the others
  int lane;

  // run(u, first column, elements that there are): vector u of those that are kept, or 0.
  template <class Run> __device__ void each(const Run& run) const {
    if constexpr (kKept) {
#pragma unroll
      for (int u = 0; u < kHeld<T>; ++u) {
        int64_t col = (int64_t(u) * kGroup + lane) * kVector<T>;
        if (col < cols) run(u, col, cols - col);
      }
    } else {
      for (int64_t col = int64_t(lane) * kVector<T>; col < cols; col += kGroup * kVector<T>) run(0, col, cols - col);
    }
  }

  // Over the group, for every thread of it; all threads of the block take part.
  template <int kCount> __device__ void sum(C (&x)[kCount]) const {
    __shared__ C of_warps[kCount][kThreads / kWarp];
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = lanes_sum<kWarp>(x[i]);
    if constexpr (kGroup > kWarp) {
      __syncthreads();  // what was here before has been read
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (threadIdx.x % kWarp == 0) of_warps[i][threadIdx.x / kWarp] = x[i];
      }
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        x[i] = 0;
        for (int w = 0; w < kGroup / kWarp; ++w) x[i] += of_warps[i][threadIdx.x / kGroup * (kGroup / kWarp) + w];
      }
    }
  }
};

// The parameters of a vector's columns; `missing` where there are none at all.
template <class T>
__device__ void load_parameters(compute_t<T> (&out)[kVector<T>], const compute_t<T>* p, int64_t col, int64_t count, bool aligned,
                                compute_t<T> missing) {
  if (p != nullptr) return load_wide<T>(out, p + col, count, aligned);
#pragma unroll
  for (int e = 0; e < kVector<T>; ++e) out[e] = missing;
}

template <class T> __device__ compute_t<T> inverse_deviation(compute_t<T> squares, int64_t cols, double eps) {
  using C = compute_t<T>;
  return C(1) / sqrt(squares / C(cols) + C(eps));
}

// --- forward ----------------------------------------------------------------------------------------------------------
template <class T> struct ForwardArgs {
  const T *x, *residual;
  const compute_t<T> *weight, *bias;
  T *y, *sum;
  int64_t rows, cols;
  double eps;
  bool centred, aligned;
};

template <class T, int kGroup, bool kKept>
__global__ void __launch_bounds__(kThreads) norm_fwd_kernel(const ForwardArgs<T> args) {
  using C = compute_t<T>;
  using RowOf = Row<T, kGroup, kKept>;
  int64_t r = int64_t(blockIdx.x) * RowOf::kGroups + threadIdx.x / kGroup;
  const RowOf row{r < args.rows ? args.cols : 0, int(threadIdx.x) % kGroup};
  const T* x = args.x + r * args.cols;
  const T* s = args.residual == nullptr ? x : args.sum + r * args.cols;
  C kept[RowOf::kVectors][kVector<T>];
  auto values = [&](int u, int64_t col, int64_t count, C(&out)[kVector<T>]) {
    if constexpr (!kKept) {
      Vector<T> v = load_count(s + col, count, args.aligned);
#pragma unroll
      for (int e = 0; e < kVector<T>; ++e) kept[u][e] = C(widen(v.at[e]));
    }
#pragma unroll
    for (int e = 0; e < kVector<T>; ++e) out[e] = kept[u][e];
  };

  C total[1] = {};
  Vector<T> loaded[RowOf::kVectors], added[RowOf::kVectors];
  if constexpr (kKept) {  // all loads before the first use
    row.each([&](int u, int64_t col, int64_t count) {
      loaded[u] = load_count(x + col, count, args.aligned);
      if (args.residual != nullptr) added[u] = load_count(args.residual + r * args.cols + col, count, args.aligned);
    });
  }
  row.each([&](int u, int64_t col, int64_t count) {
    if constexpr (!kKept) {
      loaded[u] = load_count(x + col, count, args.aligned);
      if (args.residual != nullptr) added[u] = load_count(args.residual + r * args.cols + col, count, args.aligned);
    }
    if (args.residual != nullptr) {
#pragma unroll
      for (int e = 0; e < kVector<T>; ++e) loaded[u].at[e] = narrow<T>(C(widen(loaded[u].at[e])) + C(widen(added[u].at[e])));
      store_count(args.sum + r * args.cols + col, loaded[u], count, args.aligned);
    }
#pragma unroll
    for (int e = 0; e < kVector<T>; ++e) {
      kept[u][e] = C(widen(loaded[u].at[e]));
      total[0] += kept[u][e];  // 0 past the end
    }
  });
  C mean = 0;
  if (args.centred) {
    row.sum(total);
    mean = total[0] / C(args.cols);
  }
  C squares[1] = {};
  row.each([&](int u, int64_t col, int64_t count) {
    C v[kVector<T>];
    values(u, col, count, v);
#pragma unroll
    for (int e = 0; e < kVector<T>; ++e) squares[0] += e < count ? (v[e] - mean) * (v[e] - mean) : C(0);
  });
  row.sum(squares);
  C inverse = inverse_deviation<T>(squares[0], args.cols, args.eps);
  row.each([&](int u, int64_t col, int64_t count) {
    C v[kVector<T>], weight[kVector<T>], bias[kVector<T>];
    values(u, col, count, v);
    load_parameters<T>(weight, args.weight, col, count, args.aligned, 1);
    load_parameters<T>(bias, args.bias, col, count, args.aligned, 0);
    Vector<T> out;
#pragma unroll
    for (int e = 0; e < kVector<T>; ++e) out.at[e] = narrow<T>((v[e] - mean) * inverse * weight[e] + bias[e]);
    store_count(args.y + r * args.cols + col, out, count, args.aligned);
  });
}

// --- backward ---------------------------------------------------------------------------------------------------------
template <class T> struct BackwardArgs {
  const T *dy, *dsum, *s;
  const compute_t<T>* weight;
  T* dx;
  compute_t<T>*dweight, *dbias;  // of each block, or null
  int64_t rows, cols, rows_of_block;
  double eps;
  bool centred, aligned;
};

// A block has a slice of the rows, and sums over it what the columns of each thread give to dweight and dbias: in registers, or
// in its row of the partial sums where those do not hold a row.
template <class T, int kGroup, bool kKept>
__global__ void __launch_bounds__(kThreads) norm_bwd_kernel(const BackwardArgs<T> args) {
  using C = compute_t<T>;
  using RowOf = Row<T, kGroup, kKept>;
  const int group = threadIdx.x / kGroup;
  const int64_t begin = int64_t(blockIdx.x) * args.rows_of_block;
  const int64_t end = begin + args.rows_of_block < args.rows ? begin + args.rows_of_block : args.rows;
  C *dweight = args.dweight, *dbias = args.dbias;
  if (dweight != nullptr) dweight += blockIdx.x * args.cols;
  if (dbias != nullptr) dbias += blockIdx.x * args.cols;
  C sums[2][RowOf::kVectors][kVector<T>] = {};

  for (int64_t first = begin; first < end; first += RowOf::kGroups) {
    const int64_t r = first + group;
    const RowOf row{r < end ? args.cols : 0, int(threadIdx.x) % kGroup};
    const T *dy = args.dy + r * args.cols, *s = args.s + r * args.cols;
    Vector<T> of_dy[RowOf::kVectors], of_s[RowOf::kVectors], of_dsum[RowOf::kVectors];
    auto load = [&](int u, int64_t col, int64_t count) {
      of_s[u] = load_count(s + col, count, args.aligned);
      of_dy[u] = load_count(dy + col, count, args.aligned);
      if (args.dsum != nullptr) of_dsum[u] = load_count(args.dsum + r * args.cols + col, count, args.aligned);
    };
    if constexpr (kKept) row.each(load);
    C total[1] = {};
    if (args.centred) {
      row.each([&](int u, int64_t col, int64_t count) {
        if constexpr (!kKept) of_s[u] = load_count(s + col, count, args.aligned);
#pragma unroll
        for (int e = 0; e < kVector<T>; ++e) total[0] += C(widen(of_s[u].at[e]));
      });
      row.sum(total);
    }
    C mean = total[0] / C(args.cols);
    C of_row[3] = {};  // of squares, of gradients along s, of gradients
    row.each([&](int u, int64_t col, int64_t count) {
      if constexpr (!kKept) load(u, col, count);
      C weight[kVector<T>];
      load_parameters<T>(weight, args.weight, col, count, args.aligned, 1);
#pragma unroll
      for (int e = 0; e < kVector<T>; ++e) {
        if (e >= count) continue;
        C d = C(widen(of_s[u].at[e])) - mean, g = C(widen(of_dy[u].at[e])) * weight[e];
        of_row[0] += d * d, of_row[1] += g * d, of_row[2] += g;
      }
    });
    row.sum(of_row);
    C inverse = inverse_deviation<T>(of_row[0], args.cols, args.eps);
    C along = of_row[1] * inverse / C(args.cols), level = args.centred ? of_row[2] / C(args.cols) : C(0);
    row.each([&](int u, int64_t col, int64_t count) {
      if constexpr (!kKept) load(u, col, count);
      C weight[kVector<T>];
      load_parameters<T>(weight, args.weight, col, count, args.aligned, 1);
      Vector<T> out;
#pragma unroll
      for (int e = 0; e < kVector<T>; ++e) {
        C unit = (C(widen(of_s[u].at[e])) - mean) * inverse, g = C(widen(of_dy[u].at[e]));
        C d = inverse * (g * weight[e] - level - unit * along);
        if (args.dsum != nullptr) d += C(widen(of_dsum[u].at[e]));
        out.at[e] = narrow<T>(d);
        if constexpr (kKept) {
          sums[0][u][e] += g * unit, sums[1][u][e] += g;
        } else if (e < count) {
          if (dweight != nullptr) dweight[col + e] = (r == begin ? C(0) : dweight[col + e]) + g * unit;
          if (dbias != nullptr) dbias[col + e] = (r == begin ? C(0) : dbias[col + e]) + g;
        }
      }
      store_count(args.dx + r * args.cols + col, out, count, args.aligned);
    });
  }
  if constexpr (!kKept) return;
  constexpr bool kOneGroup = RowOf::kGroups == 1;
  const RowOf row{args.cols, int(threadIdx.x) % kGroup};
  __shared__ C of_groups[RowOf::kGroups][kOneGroup ? 1 : kGroup * kHeld<T> * kVector<T>];
#pragma unroll
  for (int which = 0; which < 2; ++which) {
    C* to = which == 0 ? dweight : dbias;
    if (to == nullptr) continue;
    row.each([&](int u, int64_t col, int64_t count) {
#pragma unroll
      for (int e = 0; e < kVector<T>; ++e) {
        if (e >= count) continue;
        (kOneGroup ? to : of_groups[group])[col + e] = sums[which][u][e];
      }
    });
    if constexpr (!kOneGroup) {
      __syncthreads();
      for (int64_t col = threadIdx.x; col < args.cols; col += kThreads) {
        C sum = 0;
        for (int g = 0; g < RowOf::kGroups; ++g) sum += of_groups[g][col];
        to[col] = sum;
      }
      __syncthreads();
    }
  }
}

// --- launch -----------------------------------------------------------------------------------------------------------
// run(the group's threads, whether they keep a row) as types.
template <class T, class Run> void dispatch_row(int64_t cols, const Run& run) {
  constexpr int kOfThread = kHeld<T> * kVector<T>, kHalfway = kThreads / 4;
  if (cols <= kWarp * kOfThread) {
    run(std::integral_constant<int, kWarp>{}, std::true_type{});
  } else if (cols <= kHalfway * kOfThread) {
    run(std::integral_constant<int, kHalfway>{}, std::true_type{});
  } else if (cols <= kThreads * kOfThread) {
    run(std::integral_constant<int, kThreads>{}, std::true_type{});
  } else {
    run(std::integral_constant<int, kThreads>{}, std::false_type{});
  }
}

// Of a block: a matter of sizes alone, so that sums come out the same everywhere. 256 blocks fill any GPU; each of a block's
// groups gets a row at least.
int64_t rows_of_block(DType dtype, int64_t rows, int64_t cols) {
  int64_t groups = 0;
  dispatch_float(dtype, [&](auto tag) {
    dispatch_row<typename decltype(tag)::type>(cols, [&](auto threads, auto) { groups = kThreads / decltype(threads)::value; });
  });
  return std::max(ceil_div(rows, 256), groups);
}

template <class... Pointers> bool all_aligned(Pointers... p) { return (aligned16(p) && ...); }

}  // namespace

void norm_forward(const Target& target, DType dtype, const void* x, const void* residual, const void* weight, const void* bias,
                  void* y, void* sum, int64_t rows, int64_t cols, double eps, bool centred) {
  dispatch_float(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using C = compute_t<T>;
    bool aligned = cols % kVector<T> == 0 && all_aligned(x, residual, weight, bias, y, sum);
    ForwardArgs<T> args{static_cast<const T*>(x), static_cast<const T*>(residual), static_cast<const C*>(weight),
                        static_cast<const C*>(bias), static_cast<T*>(y), static_cast<T*>(sum), rows, cols, eps, centred, aligned};
    dispatch_row<T>(cols, [&](auto threads, auto kept) {
      constexpr int kGroup = decltype(threads)::value;
      launch(target, "norm", norm_fwd_kernel<T, kGroup, decltype(kept)::value>, grid_of(ceil_div(rows, kThreads / kGroup)), kThreads,
             0, args);
    });
  });
}

int64_t norm_slices(DType dtype, int64_t rows, int64_t cols) { return ceil_div(rows, rows_of_block(dtype, rows, cols)); }

void norm_backward(const Target& target, DType dtype, const void* dy, const void* dsum, const void* s, const void* weight, void* dx,
                   void* dweight, void* dbias, void* partial, int64_t rows, int64_t cols, double eps, bool centred) {
  dispatch_float(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using C = compute_t<T>;
    bool aligned = cols % kVector<T> == 0 && all_aligned(dy, dsum, s, weight, dx);
    int64_t slices = norm_slices(dtype, rows, cols);
    C* of_weight = dweight == nullptr ? nullptr : static_cast<C*>(partial);
    C* of_bias = dbias == nullptr ? nullptr : static_cast<C*>(partial) + (dweight == nullptr ? 0 : slices * cols);
    BackwardArgs<T> args{static_cast<const T*>(dy), static_cast<const T*>(dsum), static_cast<const T*>(s), static_cast<const C*>(weight),
                         static_cast<T*>(dx), of_weight, of_bias, rows, cols, rows_of_block(dtype, rows, cols), eps, centred, aligned};
    dispatch_row<T>(cols, [&](auto threads, auto kept) {
      launch(target, "norm_backward", norm_bwd_kernel<T, decltype(threads)::value, decltype(kept)::value>, grid_of(slices), kThreads, 0,
             args);
    });
    if (dweight != nullptr) sum_columns<C>(target, "norm_backward", of_weight, static_cast<C*>(dweight), slices, cols);
    if (dbias != nullptr) sum_columns<C>(target, "norm_backward", of_bias, static_cast<C*>(dbias), slices, cols);
  });
}

}  // namespace fastlm::cuda
