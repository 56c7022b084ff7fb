// Attention in fp16 and bf16 on tensor cores (sm_80 and later), forward and backward, in the manner of FlashAttention-2
// (Dao 2023, https://arxiv.org/abs/2307.08691): tiles in shared memory, online softmax, scores never in device memory.
//
// A block has 4 warps and owns 64 rows of the output, a warp 16. Products are mma.m16n8k16 with fp32 accumulators, fed by
// ldmatrix from swizzled tiles that cp.async fills while the previous tile is used. P goes from the accumulators of one
// product straight into the operand of the next. Head dims are padded with zeros in shared memory to 64, 128 or 256.
//
// Backward is one kernel in two roles, without atomics and hence with the same bits every time: a block owns 64 queries
// and walks over keys (dq), or owns 64 keys and walks over queries, of all query heads of its group (dk and dv). Scores
// are computed in both: 7 products instead of the 5 that atomics would need.
#include "attention.cuh"

namespace fastlm::cuda::attention {
namespace {

constexpr int kThreads = 128;
constexpr int kRows = 64;  // of a block
constexpr int kWarpRows = 16;

// --- tiles ------------------------------------------------------------------------------------------------------------
// Starts filling a tile of kTileRows rows, padded to kD columns, with rows `first` on of a matrix; zeros past its edges.
template <class T, int kTileRows, int kD>
__device__ void load_tile(T* tile, const T* matrix, int64_t stride, int first, int rows, int width, bool aligned) {
  constexpr int kChunks = kD / 8;
  auto load = [&](int i, bool whole) {
    int row = i / kChunks, chunk = i % kChunks;
    bool inside = first + row < rows && 8 * chunk < width;
    T* to = tile + tile_offset(row, chunk, kChunks);
    const T* from = inside ? matrix + (first + row) * stride + 8 * chunk : matrix;
    if (whole) {
      copy_async<16>(to, from, inside);
    } else {
      *reinterpret_cast<Vector<T>*>(to) = load_count(from, inside ? width - 8 * chunk : 0, false);
    }
  };
  if (aligned) {
#pragma unroll 4
    for (int i = threadIdx.x; i < kTileRows * kChunks; i += kThreads) load(i, true);
  } else {
#pragma unroll 1
    for (int i = threadIdx.x; i < kTileRows * kChunks; i += kThreads) load(i, false);
  }
}

// Whether this thread's share of a tile holds an inf or a NaN.
template <class T, int kTileRows, int kD> __device__ bool has_nonfinite(const T* tile) {
  constexpr uint32_t kExponent = std::is_same_v<T, f16> ? 0x7c00u : 0x7f80u;
  struct alignas(16) Words { uint32_t at[4]; };
  bool found = false;
#pragma unroll 2
  for (int i = threadIdx.x; i < kTileRows * kD / 8; i += kThreads) {
    Words words = reinterpret_cast<const Words*>(tile)[i];
#pragma unroll
    for (uint32_t pair : words.at) {
      found |= (pair & kExponent) == kExponent || (pair >> 16 & kExponent) == kExponent;
    }
  }
  return found;
}

// Writes the warp's 16 rows of accumulators, times a factor per row, to rows `first` on of a matrix. They pass through
// `tile`, of which this warp alone uses its own 16 rows, to leave in 16-byte pieces.
template <class T, int kD, int kOut>
__device__ void store_rows(T* tile, const float (&acc)[kOut / 8][4], float factor0, float factor1, T* matrix,
                           int64_t stride, int first, int rows, int width, bool aligned) {
  constexpr int kChunks = kD / 8;
  int lane = threadIdx.x % kWarp, warp_row = threadIdx.x / kWarp * kWarpRows;
  sync_warp();
#pragma unroll
  for (int n = 0; n < kOut / 8; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float factor = half ? factor1 : factor0;
      T* to = tile + tile_offset(warp_row + acc_row(lane, 2 * half), n, kChunks) + acc_col(lane, 0);
      *reinterpret_cast<uint32_t*>(to) = pack<T>(acc[n][2 * half] * factor, acc[n][2 * half + 1] * factor);
    }
  }
  sync_warp();
#pragma unroll 2
  for (int i = lane; i < kWarpRows * (kOut / 8); i += kWarp) {
    int row = warp_row + i / (kOut / 8), chunk = i % (kOut / 8);
    if (first + row >= rows || 8 * chunk >= width) continue;
    Vector<T> v = *reinterpret_cast<const Vector<T>*>(tile + tile_offset(row, chunk, kChunks));
    store_count(matrix + (first + row) * stride + 8 * chunk, v, width - 8 * chunk, aligned);
  }
}

// --- products ---------------------------------------------------------------------------------------------------------
// Columns 16 k ... 16 k + 15 of the warp's 16 rows of a tile, as operand A.
template <class T, int kD> __device__ void load_a(uint32_t (&a)[4], const T* tile, int k) {
  LaneAddress at = a_address(threadIdx.x % kWarp);
  load_matrices(a, tile + tile_offset(threadIdx.x / kWarp * kWarpRows + at.row, 2 * k + at.chunk, kD / 8));
}

// acc (16 x kCols) = x (16 x kD) y^T, with y a tile of kCols rows; operand(a, k) loads step k of x.
template <class T, int kD, int kCols, class LoadA>
__device__ void product_transposed(float (&acc)[kCols / 8][4], const LoadA& operand, const T* y) {
  LaneAddress at = b_address(threadIdx.x % kWarp);
#pragma unroll
  for (int n = 0; n < kCols / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) acc[n][e] = 0;
  }
#pragma unroll
  for (int k = 0; k < kD / 16; ++k) {
    uint32_t a[4];
    operand(a, k);
#pragma unroll
    for (int n = 0; n < kCols / 16; ++n) {
      uint32_t b[4];
      load_matrices(b, y + tile_offset(16 * n + at.row, 2 * k + at.chunk, kD / 8));
      multiply_add<T>(acc[2 * n], a, b[0], b[1]);
      multiply_add<T>(acc[2 * n + 1], a, b[2], b[3]);
    }
  }
}

// acc (16 x kOut) += p (16 x kCols, as accumulators) y, with y kOut columns, from chunk0 on, of a tile of kCols rows
template <class T, int kD, int kCols, int kOut>
__device__ void product(float (&acc)[kOut / 8][4], const float (&p)[kCols / 8][4], const T* y, int chunk0) {
  LaneAddress at = b_transposed_address(threadIdx.x % kWarp);
#pragma unroll
  for (int k = 0; k < kCols / 16; ++k) {
    const float(&p0)[4] = p[2 * k];
    const float(&p1)[4] = p[2 * k + 1];
    uint32_t a[4] = {pack<T>(p0[0], p0[1]), pack<T>(p0[2], p0[3]), pack<T>(p1[0], p1[1]), pack<T>(p1[2], p1[3])};
#pragma unroll
    for (int n = 0; n < kOut / 16; ++n) {
      uint32_t b[4];
      load_matrices_transposed(b, y + tile_offset(16 * k + at.row, chunk0 + 2 * n + at.chunk, kD / 8));
      multiply_add<T>(acc[2 * n], a, b[0], b[1]);
      multiply_add<T>(acc[2 * n + 1], a, b[2], b[3]);
    }
  }
}

// The same where y holds an inf or a NaN that some rows must not see: 0 * NaN would reach them through the tensor cores.
// Term by term and slow; it runs only on tiles that are partly masked and hold such a value.
template <class T, int kD, int kCols, int kOut, class Visible>
__device__ void product_guarded(float (&acc)[kOut / 8][4], const float (&p)[kCols / 8][4], const T* y, int chunk0,
                                const Visible& visible) {
  int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int n = 0; n < kCols / 8; ++n) {
#pragma unroll 1
    for (int c = 0; c < 8; ++c) {
      int source = lane / 4 * 4 + c / 2;  // the lane of this row group that holds column c
      float upper = shuffle(c % 2 ? p[n][1] : p[n][0], source), lower = shuffle(c % 2 ? p[n][3] : p[n][2], source);
      int col = 8 * n + c;
      bool upper_sees = visible(acc_row(lane, 0), col), lower_sees = visible(acc_row(lane, 2), col);
#pragma unroll
      for (int o = 0; o < kOut / 8; ++o) {
        const T* at = y + tile_offset(col, chunk0 + o, kD / 8) + acc_col(lane, 0);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float value = widen(at[e]);
          if (upper_sees) acc[o][e] += upper * value;
          if (lower_sees) acc[o][2 + e] += lower * value;
        }
      }
    }
  }
}

// --- forward ----------------------------------------------------------------------------------------------------------
template <int kD> struct ForwardTiles {
  static constexpr int kCols = kD <= 128 ? 64 : 32;
  static constexpr int kSharedBytes = (kRows + 2 * kCols) * kD * 2;
};

// The key tile is refilled while P V is computed, the value tile while Q K^T is.
template <class T, int kD> __global__ void __launch_bounds__(kThreads, 2) attention_fwd_kernel(const ForwardArgs args) {
  constexpr int kCols = ForwardTiles<kD>::kCols;
  const Problem& problem = args.problem;
  const Mask mask = problem.mask;
  int tiles = (mask.queries + kRows - 1) / kRows;
  int q0 = (tiles - 1 - int(blockIdx.x % tiles)) * kRows;  // the longest rows of a causal mask first
  int64_t head = blockIdx.x / tiles % problem.heads_q, batch = blockIdx.x / tiles / problem.heads_q;
  int64_t head_k = head / (problem.heads_q / problem.heads_k);

  T* tile_q = reinterpret_cast<T*>(dynamic_shared());
  T* tile_k = tile_q + kRows * kD;
  T* tile_v = tile_k + kCols * kD;
  const T* q = static_cast<const T*>(args.q.data) + batch * args.q.batch + head * args.q.head;
  const T* k = static_cast<const T*>(args.k.data) + batch * args.k.batch + head_k * args.k.head;
  const T* v = static_cast<const T*>(args.v.data) + batch * args.v.batch + head_k * args.v.head;

  int lane = threadIdx.x % kWarp, row0 = q0 + threadIdx.x / kWarp * kWarpRows;  // of the warp
  float acc[kD / 8][4] = {};
  float max[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};  // of rows lane / 4 and lane / 4 + 8; sum: this lane's columns
  float scale = problem.scale * kLog2e;
  int begin = mask.key_begin(q0) / kCols * kCols, end = mask.key_end(q0, kRows);

  load_tile<T, kRows, kD>(tile_q, q, args.q.row, q0, mask.queries, problem.width, args.aligned);
  load_tile<T, kCols, kD>(tile_k, k, args.k.row, begin, mask.keys, problem.width, args.aligned);
  copy_commit();
  for (int k0 = begin; k0 < end; k0 += kCols) {
    load_tile<T, kCols, kD>(tile_v, v, args.v.row, k0, mask.keys, problem.width_v, args.aligned);
    copy_commit();
    copy_wait<1>();  // for the keys
    __syncthreads();
    float s[kCols / 8][4];
    product_transposed<T, kD, kCols>(s, [&](uint32_t(&a)[4], int step) { load_a<T, kD>(a, tile_q, step); }, tile_k);

    bool whole = mask.whole(q0, kRows, k0, kCols);
    float new_max[2] = {max[0], max[1]};
#pragma unroll
    for (int n = 0; n < kCols / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        s[n][e] *= scale;
        if (!whole && !mask.visible(row0 + acc_row(lane, e), k0 + 8 * n + acc_col(lane, e))) s[n][e] = -INFINITY;
        new_max[e / 2] = fmaxf(new_max[e / 2], s[n][e]);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      new_max[half] = lanes_max<4>(new_max[half]);
      float rescale = exp2_approx(max[half] - finite_max(new_max[half]));
      max[half] = new_max[half];
      sum[half] *= rescale;
#pragma unroll
      for (int n = 0; n < kD / 8; ++n) {
        acc[n][2 * half] *= rescale;
        acc[n][2 * half + 1] *= rescale;
      }
    }
#pragma unroll
    for (int n = 0; n < kCols / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        s[n][e] = exp2_approx(s[n][e] - finite_max(max[e / 2]));
        sum[e / 2] += s[n][e];
      }
    }

    copy_wait<0>();  // for the values
    __syncthreads();
    if (k0 + kCols < end) {
      load_tile<T, kCols, kD>(tile_k, k, args.k.row, k0 + kCols, mask.keys, problem.width, args.aligned);
    }
    copy_commit();
    if (!whole && __syncthreads_or(has_nonfinite<T, kCols, kD>(tile_v))) {
      product_guarded<T, kD, kCols, kD>(acc, s, tile_v, 0,
                                        [&](int row, int col) { return mask.visible(row0 + row, k0 + col); });
    } else {
      product<T, kD, kCols, kD>(acc, s, tile_v, 0);
    }
    __syncthreads();  // before the next values overwrite these
  }
  copy_wait<0>();
  __syncthreads();

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    sum[half] = lanes_sum<4>(sum[half]);
    int row = row0 + acc_row(lane, 2 * half);
    if (lane % 4 == 0 && row < mask.queries) {
      args.lse[(batch * problem.heads_q + head) * mask.queries + row] = final_lse(max[half], sum[half]);
    }
  }
  T* o = static_cast<T*>(const_cast<void*>(args.o.data)) + batch * args.o.batch + head * args.o.head;
  store_rows<T, kD, kD>(tile_q, acc, final_factor(sum[0]), final_factor(sum[1]), o, args.o.row, q0, mask.queries,
                        problem.width_v, args.aligned);
}

// --- backward ---------------------------------------------------------------------------------------------------------
enum class Role { kQueries, kKeys };  // what a block owns

template <int kD, Role kRole> struct BackwardTiles {
  static constexpr int kCols = kD == 64 ? 64 : kD == 128 ? 32 : 16;
  // Columns of the gradient that a block computes: dk and dv of 256 columns would not fit into registers.
  static constexpr int kOut = kD == 256 && kRole == Role::kKeys ? 128 : kD;
  static constexpr int kStages = 2;
  static constexpr int kSharedBytes = (2 * kRows + kStages * 2 * kCols) * kD * 2 + kStages * kCols * int(sizeof(float2));
};

// Owned tiles x1, x2 and streamed tiles y1, y2 are (q, d_o) and (k, v), or (k, v) and (q, d_o). Then S = x1 y1^T and
// dP = x2 y2^T, both transposed in the second role, and the gradients are dS y1 (dq or dk) and P^T y2 (dv).
template <class T, int kD, Role kRole>
__global__ void __launch_bounds__(kThreads, 2) attention_bwd_kernel(const BackwardArgs args) {
  using Tiles = BackwardTiles<kD, kRole>;
  constexpr int kCols = Tiles::kCols, kOut = Tiles::kOut;
  constexpr bool kKeys = kRole == Role::kKeys;
  const Problem& problem = args.problem;
  const Mask mask = problem.mask;
  int group = problem.heads_q / problem.heads_k;
  int rows = kKeys ? mask.keys : mask.queries, cols = kKeys ? mask.queries : mask.keys;
  int tiles = (rows + kRows - 1) / kRows, heads = kKeys ? problem.heads_k : problem.heads_q;
  int tile = blockIdx.x % tiles;
  int r0 = (kKeys ? tile : tiles - 1 - tile) * kRows;  // the longest rows of a causal mask first
  int64_t head = blockIdx.x / tiles % heads, batch = blockIdx.x / tiles / heads;
  int chunk0 = blockIdx.y * (kOut / 8);

  T* x1 = reinterpret_cast<T*>(dynamic_shared());
  T* x2 = x1 + kRows * kD;
  T* y = x2 + kRows * kD;  // per stage: y1, y2
  float2* col_stats = reinterpret_cast<float2*>(y + Tiles::kStages * 2 * kCols * kD);
  const Operand &op_x1 = kKeys ? args.k : args.q, &op_x2 = kKeys ? args.v : args.d_o;
  const Operand &op_y1 = kKeys ? args.q : args.k, &op_y2 = kKeys ? args.d_o : args.v;
  const T* from_x1 = static_cast<const T*>(op_x1.data) + batch * op_x1.batch + head * op_x1.head;
  const T* from_x2 = static_cast<const T*>(op_x2.data) + batch * op_x2.batch + head * op_x2.head;

  // Streamed tiles: for keys those of every query head of the group, one head after the other.
  int c_begin = (kKeys ? mask.query_begin(r0) : mask.key_begin(r0)) / kCols * kCols;
  int c_end = kKeys ? mask.query_end(r0, kRows) : mask.key_end(r0, kRows);
  int per_head = c_end > c_begin ? (c_end - c_begin + kCols - 1) / kCols : 0;
  int steps = per_head * (kKeys ? group : 1);
  auto head_of = [&](int step) { return kKeys ? head * group + step / per_head : head / group; };
  auto column_of = [&](int step) { return c_begin + step % per_head * kCols; };
  auto load_step = [&](int step) {
    if (step < steps) {
      int64_t head_y = head_of(step);
      int c0 = column_of(step);
      T* y1 = y + step % Tiles::kStages * (2 * kCols * kD);
      load_tile<T, kCols, kD>(y1, static_cast<const T*>(op_y1.data) + batch * op_y1.batch + head_y * op_y1.head, op_y1.row,
                              c0, cols, problem.width, args.aligned);
      load_tile<T, kCols, kD>(y1 + kCols * kD, static_cast<const T*>(op_y2.data) + batch * op_y2.batch + head_y * op_y2.head,
                              op_y2.row, c0, cols, problem.width_v, args.aligned);
      if (kKeys && threadIdx.x < kCols) {
        int c = c0 + threadIdx.x;
        const float2* stats = args.stats + (batch * problem.heads_q + head_y) * mask.queries;
        copy_async<8>(col_stats + step % Tiles::kStages * kCols + threadIdx.x, c < cols ? stats + c : stats, c < cols);
      }
    }
    copy_commit();  // also where there is nothing more, so that the waits below always count the same
  };

  int lane = threadIdx.x % kWarp, row0 = r0 + threadIdx.x / kWarp * kWarpRows;
  float2 row_stats[2] = {};
  if (!kKeys) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int row = row0 + acc_row(lane, 2 * half);
      if (row < rows) row_stats[half] = args.stats[(batch * problem.heads_q + head) * mask.queries + row];
    }
  }
  float acc1[kOut / 8][4] = {};                // dq or dk
  float acc2[kKeys ? kOut / 8 : 1][4] = {};    // dv
  float scale = problem.scale * kLog2e;

  load_tile<T, kRows, kD>(x1, from_x1, op_x1.row, r0, rows, problem.width, args.aligned);
  load_tile<T, kRows, kD>(x2, from_x2, op_x2.row, r0, rows, problem.width_v, args.aligned);
  load_step(0);
  for (int step = 0; step < steps; ++step) {
    load_step(step + 1);
    copy_wait<1>();
    __syncthreads();
    int c0 = column_of(step);
    const T* y1 = y + step % Tiles::kStages * (2 * kCols * kD);
    const T* y2 = y1 + kCols * kD;
    float p[kCols / 8][4], ds[kCols / 8][4];
    product_transposed<T, kD, kCols>(p, [&](uint32_t(&a)[4], int k) { load_a<T, kD>(a, x1, k); }, y1);
    product_transposed<T, kD, kCols>(ds, [&](uint32_t(&a)[4], int k) { load_a<T, kD>(a, x2, k); }, y2);

    auto visible = [&](int row, int col) {
      return kKeys ? c0 + col < cols && mask.visible(c0 + col, row0 + row) : mask.visible(row0 + row, c0 + col);
    };
    bool whole = kKeys ? c0 + kCols <= cols && mask.whole(c0, kCols, r0, kRows) : mask.whole(r0, kRows, c0, kCols);
#pragma unroll
    for (int n = 0; n < kCols / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float2 stats = kKeys ? col_stats[step % Tiles::kStages * kCols + 8 * n + acc_col(lane, e)] : row_stats[e / 2];
        bool seen = whole || visible(acc_row(lane, e), 8 * n + acc_col(lane, e));
        p[n][e] = seen ? exp2_approx(p[n][e] * scale - stats.x) : 0.0f;
        ds[n][e] = seen ? p[n][e] * (ds[n][e] - stats.y) : 0.0f;
      }
    }

    bool guarded = !whole && __syncthreads_or(has_nonfinite<T, kCols, kD>(y1) ||
                                              (kKeys && has_nonfinite<T, kCols, kD>(y2)));
    if (guarded) {
      product_guarded<T, kD, kCols, kOut>(acc1, ds, y1, chunk0, visible);
      if constexpr (kKeys) product_guarded<T, kD, kCols, kOut>(acc2, p, y2, chunk0, visible);
    } else {
      product<T, kD, kCols, kOut>(acc1, ds, y1, chunk0);
      if constexpr (kKeys) product<T, kD, kCols, kOut>(acc2, p, y2, chunk0);
    }
    __syncthreads();  // before the step after next overwrites these tiles
  }
  copy_wait<0>();
  __syncthreads();

  auto store = [&](T* tile, const float(&acc)[kOut / 8][4], float factor, const Operand& out, int width) {
    T* to = static_cast<T*>(const_cast<void*>(out.data)) + batch * out.batch + head * out.head + 8 * chunk0;
    store_rows<T, kD, kOut>(tile, acc, factor, factor, to, out.row, r0, rows, width - 8 * chunk0, args.aligned);
  };
  store(x1, acc1, problem.scale, kKeys ? args.dk : args.dq, problem.width);
  if constexpr (kKeys) store(x2, acc2, 1.0f, args.dv, problem.width_v);
}

// --- launch -----------------------------------------------------------------------------------------------------------
template <class Run> void dispatch_half(DType dtype, const Run& run) {
  dtype == DType::kF16 ? run(TypeTag<f16>{}) : run(TypeTag<bf16>{});
}

int64_t blocks_of(const Problem& problem, int rows, int heads) {
  return int64_t(problem.batch) * heads * ceil_div(rows, kRows);
}

template <class T, int kD, Role kRole> void launch_backward(const Target& target, const BackwardArgs& args) {
  using Tiles = BackwardTiles<kD, kRole>;
  const Problem& problem = args.problem;
  dim3 grid = kRole == Role::kKeys ? grid_of(blocks_of(problem, problem.mask.keys, problem.heads_k))
                                   : grid_of(blocks_of(problem, problem.mask.queries, problem.heads_q));
  grid.y = kD / Tiles::kOut;
  launch(target, "attention_backward", attention_bwd_kernel<T, kD, kRole>, grid, kThreads, Tiles::kSharedBytes, args);
}

}  // namespace

bool mma_runs(const Target& target) { return compiled_capability(target, attention_fwd_kernel<f16, 64>) >= 80; }

void forward_mma(const Target& target, const ForwardArgs& args) {
  dispatch_half(args.problem.dtype, [&](auto tag) {
    dispatch_width(args.problem, [&](auto width) {
      using T = typename decltype(tag)::type;
      constexpr int kD = decltype(width)::value;
      launch(target, "attention", attention_fwd_kernel<T, kD>,
             grid_of(blocks_of(args.problem, args.problem.mask.queries, args.problem.heads_q)), kThreads,
             ForwardTiles<kD>::kSharedBytes, args);
    });
  });
}

void backward_mma(const Target& target, const BackwardArgs& args) {
  dispatch_half(args.problem.dtype, [&](auto tag) {
    dispatch_width(args.problem, [&](auto width) {
      using T = typename decltype(tag)::type;
      constexpr int kD = decltype(width)::value;
      if (args.dq.data != nullptr) launch_backward<T, kD, Role::kQueries>(target, args);
      if (args.dk.data != nullptr) launch_backward<T, kD, Role::kKeys>(target, args);
    });
  });
}

}  // namespace fastlm::cuda::attention
