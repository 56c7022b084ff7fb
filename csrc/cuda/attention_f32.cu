// Attention in fp32 arithmetic without tensor cores, forward and backward: float32 on every device (never rounded to
// TF32), and all dtypes on devices older than sm_80. Tensors of 16-bit dtypes are widened as they are loaded.
//
// The tiling is that of attention_mma.cu. A block has 16 x 16 threads: thread (y, x) computes rows y, y + 16, ... of every
// product, columns x, x + 16, ... of scores and columns 4 x ... 4 x + 3, 4 x + 64 ... of outputs. Rows of tiles are padded
// by four floats, so that the 16-byte reads of eight neighbouring rows fall into different banks.
#include "attention.cuh"

namespace fastlm::cuda::attention {
namespace {

constexpr int kSide = 16;
constexpr int kThreads = kSide * kSide;
constexpr int kPad = 4;

// --- tiles ------------------------------------------------------------------------------------------------------------
// Four elements from `offset` on, widened; zeros from `count` on.
__device__ float4 load_four(const Operand& x, DType dtype, int64_t offset, int count, bool aligned) {
  if (dtype == DType::kF32) {
    const float* p = static_cast<const float*>(x.data) + offset;
    if (aligned && count >= 4) return *reinterpret_cast<const float4*>(p);
    return make_float4(count > 0 ? p[0] : 0, count > 1 ? p[1] : 0, count > 2 ? p[2] : 0, count > 3 ? p[3] : 0);
  }
  auto at = [&](int i) {
    if (i >= count) return 0.0f;
    if (dtype == DType::kF16) return widen(static_cast<const f16*>(x.data)[offset + i]);
    return widen(static_cast<const bf16*>(x.data)[offset + i]);
  };
  return make_float4(at(0), at(1), at(2), at(3));
}

__device__ void store_four(const Operand& x, DType dtype, int64_t offset, int count, const float (&v)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (i >= count) break;
    if (dtype == DType::kF32) {
      static_cast<float*>(const_cast<void*>(x.data))[offset + i] = v[i];
    } else if (dtype == DType::kF16) {
      static_cast<f16*>(const_cast<void*>(x.data))[offset + i] = narrow<f16>(v[i]);
    } else {
      static_cast<bf16*>(const_cast<void*>(x.data))[offset + i] = narrow<bf16>(v[i]);
    }
  }
}

// Fills a tile with rows `first` on of the matrix at `offset`, padded with zeros.
template <int kTileRows, int kD>
__device__ void load_tile(float* tile, const Operand& x, DType dtype, int64_t offset, int first, int rows, int width,
                          bool aligned) {
  for (int i = threadIdx.x; i < kTileRows * (kD / 4); i += kThreads) {
    int row = i / (kD / 4), col = i % (kD / 4) * 4;
    int count = first + row < rows ? width - col : 0;
    float4 v = load_four(x, dtype, offset + (first + row) * x.row + col, count, aligned);
    *reinterpret_cast<float4*>(tile + row * (kD + kPad) + col) = v;
  }
}

template <int kOwnRows, int kD>
__device__ void store_rows(const Operand& x, DType dtype, int64_t offset, const float (&acc)[kOwnRows][kD / 64][4],
                           const float (&factor)[kOwnRows], int first, int rows, int width) {
  int tx = threadIdx.x % kSide, ty = threadIdx.x / kSide;
#pragma unroll
  for (int i = 0; i < kOwnRows; ++i) {
    int row = first + ty + kSide * i;
    if (row >= rows) continue;
#pragma unroll
    for (int c = 0; c < kD / 64; ++c) {
      float v[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) v[e] = acc[i][c][e] * factor[i];
      int col = 64 * c + 4 * tx;
      store_four(x, dtype, offset + row * x.row + col, width - col, v);
    }
  }
}

// --- products ---------------------------------------------------------------------------------------------------------
// s = x y^T at this thread's rows and columns
template <int kOwnRows, int kOwnCols, int kD>
__device__ void product_transposed(float (&s)[kOwnRows][kOwnCols], const float* x, const float* y) {
  constexpr int kStride = kD + kPad;
  int tx = threadIdx.x % kSide, ty = threadIdx.x / kSide;
#pragma unroll
  for (int i = 0; i < kOwnRows; ++i) {
#pragma unroll
    for (int j = 0; j < kOwnCols; ++j) s[i][j] = 0;
  }
#pragma unroll 2
  for (int d = 0; d < kD; d += 4) {
    float4 b[kOwnCols];
#pragma unroll
    for (int j = 0; j < kOwnCols; ++j) b[j] = *reinterpret_cast<const float4*>(y + (tx + kSide * j) * kStride + d);
#pragma unroll
    for (int i = 0; i < kOwnRows; ++i) {
      float4 a = *reinterpret_cast<const float4*>(x + (ty + kSide * i) * kStride + d);
#pragma unroll
      for (int j = 0; j < kOwnCols; ++j) s[i][j] += a.x * b[j].x + a.y * b[j].y + a.z * b[j].z + a.w * b[j].w;
    }
  }
}

// acc += p y, with p a tile of kCols columns (stride kCols + 1). Terms that a row must not see are left out, not
// multiplied by zero: y may hold an inf or a NaN there.
template <int kOwnRows, int kCols, int kD, class Seen>
__device__ void product(float (&acc)[kOwnRows][kD / 64][4], const float* p, const float* y, const Seen& seen) {
  int tx = threadIdx.x % kSide, ty = threadIdx.x / kSide;
#pragma unroll 2
  for (int j = 0; j < kCols; ++j) {
    float4 b[kD / 64];
#pragma unroll
    for (int c = 0; c < kD / 64; ++c) b[c] = *reinterpret_cast<const float4*>(y + j * (kD + kPad) + 64 * c + 4 * tx);
#pragma unroll
    for (int i = 0; i < kOwnRows; ++i) {
      if (!seen(ty + kSide * i, j)) continue;
      float a = p[(ty + kSide * i) * (kCols + 1) + j];
#pragma unroll
      for (int c = 0; c < kD / 64; ++c) {
        acc[i][c][0] += a * b[c].x;
        acc[i][c][1] += a * b[c].y;
        acc[i][c][2] += a * b[c].z;
        acc[i][c][3] += a * b[c].w;
      }
    }
  }
}

// --- forward ----------------------------------------------------------------------------------------------------------
// Sizes for the 64 KB of shared memory that sm_75 has.
template <int kD> struct ForwardTiles {
  static constexpr int kRows = kD == 256 ? 32 : 64;
  static constexpr int kCols = kD == 64 ? 64 : kD == 128 ? 32 : 16;
  static constexpr int kSharedBytes = 4 * ((kRows + kCols) * (kD + kPad) + kRows * (kCols + 1));
};

template <int kD> __global__ void __launch_bounds__(kThreads, 2) attention_f32_fwd_kernel(const ForwardArgs args) {
  constexpr int kRows = ForwardTiles<kD>::kRows, kCols = ForwardTiles<kD>::kCols;
  constexpr int kOwnRows = kRows / kSide, kOwnCols = kCols / kSide;
  const Problem& problem = args.problem;
  const Mask mask = problem.mask;
  int tiles = (mask.queries + kRows - 1) / kRows;
  int q0 = (tiles - 1 - int(blockIdx.x % tiles)) * kRows;  // the longest rows of a causal mask first
  int64_t head = blockIdx.x / tiles % problem.heads_q, batch = blockIdx.x / tiles / problem.heads_q;
  int64_t head_k = head / (problem.heads_q / problem.heads_k);
  int tx = threadIdx.x % kSide, ty = threadIdx.x / kSide;

  float* tile_q = reinterpret_cast<float*>(dynamic_shared());
  float* tile_kv = tile_q + kRows * (kD + kPad);  // first the keys, then the values
  float* tile_p = tile_kv + kCols * (kD + kPad);
  int64_t k = batch * args.k.batch + head_k * args.k.head, v = batch * args.v.batch + head_k * args.v.head;

  float acc[kOwnRows][kD / 64][4] = {};
  float max[kOwnRows], sum[kOwnRows] = {};  // sum: this thread's columns
#pragma unroll
  for (int i = 0; i < kOwnRows; ++i) max[i] = -INFINITY;
  float scale = problem.scale * kLog2e;
  int begin = mask.key_begin(q0) / kCols * kCols, end = mask.key_end(q0, kRows);
  load_tile<kRows, kD>(tile_q, args.q, problem.dtype, batch * args.q.batch + head * args.q.head, q0, mask.queries,
                       problem.width, args.aligned);
  for (int k0 = begin; k0 < end; k0 += kCols) {
    load_tile<kCols, kD>(tile_kv, args.k, problem.dtype, k, k0, mask.keys, problem.width, args.aligned);
    __syncthreads();
    float s[kOwnRows][kOwnCols];
    product_transposed<kOwnRows, kOwnCols, kD>(s, tile_q, tile_kv);
    bool whole = mask.whole(q0, kRows, k0, kCols);
    auto seen = [&](int row, int col) { return whole || mask.visible(q0 + row, k0 + col); };
#pragma unroll
    for (int i = 0; i < kOwnRows; ++i) {
      int row = ty + kSide * i;
      float new_max = max[i];
#pragma unroll
      for (int j = 0; j < kOwnCols; ++j) {
        s[i][j] = seen(row, tx + kSide * j) ? s[i][j] * scale : -INFINITY;
        new_max = fmaxf(new_max, s[i][j]);
      }
      new_max = lanes_max<kSide>(new_max);
      float rescale = exp2_approx(max[i] - finite_max(new_max));
      max[i] = new_max;
      sum[i] *= rescale;
#pragma unroll
      for (int c = 0; c < kD / 64; ++c) {
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[i][c][e] *= rescale;
      }
#pragma unroll
      for (int j = 0; j < kOwnCols; ++j) {
        float p = exp2_approx(s[i][j] - finite_max(new_max));
        sum[i] += p;
        tile_p[row * (kCols + 1) + tx + kSide * j] = p;
      }
    }
    __syncthreads();  // the keys have been used, P is complete
    load_tile<kCols, kD>(tile_kv, args.v, problem.dtype, v, k0, mask.keys, problem.width_v, args.aligned);
    __syncthreads();
    product<kOwnRows, kCols, kD>(acc, tile_p, tile_kv, seen);
    __syncthreads();
  }

  float factor[kOwnRows];
#pragma unroll
  for (int i = 0; i < kOwnRows; ++i) {
    sum[i] = lanes_sum<kSide>(sum[i]);
    factor[i] = final_factor(sum[i]);
    int row = q0 + ty + kSide * i;
    if (tx == 0 && row < mask.queries) {
      args.lse[(batch * problem.heads_q + head) * mask.queries + row] = final_lse(max[i], sum[i]);
    }
  }
  store_rows<kOwnRows, kD>(args.o, problem.dtype, batch * args.o.batch + head * args.o.head, acc, factor, q0,
                           mask.queries, problem.width_v);
}

// --- backward ---------------------------------------------------------------------------------------------------------
enum class Role { kQueries, kKeys };  // what a block owns; see attention_mma.cu

template <int kD> struct BackwardTiles {  // up to 128 columns within the 64 KB of sm_75
  static constexpr int kRows = kD == 256 ? 16 : 32;
  static constexpr int kCols = kD == 64 ? 32 : 16;
  static constexpr int kSharedBytes = 4 * (2 * (kRows + kCols) * (kD + kPad) + 2 * kRows * (kCols + 1));
};

template <int kD, Role kRole>
__global__ void __launch_bounds__(kThreads, 2) attention_f32_bwd_kernel(const BackwardArgs args) {
  constexpr int kRows = BackwardTiles<kD>::kRows, kCols = BackwardTiles<kD>::kCols;
  constexpr int kOwnRows = kRows / kSide, kOwnCols = kCols / kSide;
  constexpr bool kKeys = kRole == Role::kKeys;
  const Problem& problem = args.problem;
  const Mask mask = problem.mask;
  int group = problem.heads_q / problem.heads_k;
  int rows = kKeys ? mask.keys : mask.queries, cols = kKeys ? mask.queries : mask.keys;
  int tiles = (rows + kRows - 1) / kRows, heads = kKeys ? problem.heads_k : problem.heads_q;
  int tile = blockIdx.x % tiles;
  int r0 = (kKeys ? tile : tiles - 1 - tile) * kRows;  // the longest rows of a causal mask first
  int64_t head = blockIdx.x / tiles % heads, batch = blockIdx.x / tiles / heads;
  int tx = threadIdx.x % kSide, ty = threadIdx.x / kSide;

  float* x1 = reinterpret_cast<float*>(dynamic_shared());
  float* x2 = x1 + kRows * (kD + kPad);
  float* y1 = x2 + kRows * (kD + kPad);
  float* y2 = y1 + kCols * (kD + kPad);
  float* tile_p = y2 + kCols * (kD + kPad);
  float* tile_ds = tile_p + kRows * (kCols + 1);
  const Operand &op_x1 = kKeys ? args.k : args.q, &op_x2 = kKeys ? args.v : args.d_o;
  const Operand &op_y1 = kKeys ? args.q : args.k, &op_y2 = kKeys ? args.d_o : args.v;
  load_tile<kRows, kD>(x1, op_x1, problem.dtype, batch * op_x1.batch + head * op_x1.head, r0, rows, problem.width,
                       args.aligned);
  load_tile<kRows, kD>(x2, op_x2, problem.dtype, batch * op_x2.batch + head * op_x2.head, r0, rows, problem.width_v,
                       args.aligned);

  float acc1[kOwnRows][kD / 64][4] = {}, acc2[kOwnRows][kD / 64][4] = {};  // dq or dk; dv
  float scale = problem.scale * kLog2e;
  int c_begin = (kKeys ? mask.query_begin(r0) : mask.key_begin(r0)) / kCols * kCols;
  int c_end = kKeys ? mask.query_end(r0, kRows) : mask.key_end(r0, kRows);
  for (int member = 0; member < (kKeys ? group : 1); ++member) {
    int64_t head_y = kKeys ? head * group + member : head / group;
    int64_t head_q = kKeys ? head_y : head;
    const float2* stats = args.stats + (batch * problem.heads_q + head_q) * mask.queries;
    for (int c0 = c_begin; c0 < c_end; c0 += kCols) {
      load_tile<kCols, kD>(y1, op_y1, problem.dtype, batch * op_y1.batch + head_y * op_y1.head, c0, cols, problem.width,
                           args.aligned);
      load_tile<kCols, kD>(y2, op_y2, problem.dtype, batch * op_y2.batch + head_y * op_y2.head, c0, cols, problem.width_v,
                           args.aligned);
      __syncthreads();
      float s[kOwnRows][kOwnCols], dp[kOwnRows][kOwnCols];
      product_transposed<kOwnRows, kOwnCols, kD>(s, x1, y1);
      product_transposed<kOwnRows, kOwnCols, kD>(dp, x2, y2);
      bool whole = kKeys ? mask.whole(c0, kCols, r0, kRows) : mask.whole(r0, kRows, c0, kCols);
      auto seen = [&](int row, int col) {
        return whole || (kKeys ? mask.visible(c0 + col, r0 + row) : mask.visible(r0 + row, c0 + col));
      };
#pragma unroll
      for (int i = 0; i < kOwnRows; ++i) {
#pragma unroll
        for (int j = 0; j < kOwnCols; ++j) {
          int row = ty + kSide * i, col = tx + kSide * j, query = kKeys ? c0 + col : r0 + row;
          float p = 0, ds = 0;
          if (query < mask.queries && seen(row, col)) {
            p = exp2_approx(s[i][j] * scale - stats[query].x);
            ds = p * (dp[i][j] - stats[query].y);
          }
          tile_p[row * (kCols + 1) + col] = p;
          tile_ds[row * (kCols + 1) + col] = ds;
        }
      }
      __syncthreads();
      product<kOwnRows, kCols, kD>(acc1, tile_ds, y1, seen);
      if constexpr (kKeys) product<kOwnRows, kCols, kD>(acc2, tile_p, y2, seen);
      __syncthreads();
    }
  }

  auto store = [&](const Operand& out, const float(&acc)[kOwnRows][kD / 64][4], float by, int width) {
    float factor[kOwnRows];
#pragma unroll
    for (int i = 0; i < kOwnRows; ++i) factor[i] = by;
    store_rows<kOwnRows, kD>(out, problem.dtype, batch * out.batch + head * out.head, acc, factor, r0, rows, width);
  };
  store(kKeys ? args.dk : args.dq, acc1, problem.scale, problem.width);
  if constexpr (kKeys) store(args.dv, acc2, 1.0f, problem.width_v);
}

// --- launch -----------------------------------------------------------------------------------------------------------
int64_t blocks_of(const Problem& problem, int rows, int heads, int tile_rows) {
  return int64_t(problem.batch) * heads * ceil_div(rows, tile_rows);
}

template <int kD, Role kRole> void launch_backward(const Target& target, const BackwardArgs& args) {
  const Problem& problem = args.problem;
  int64_t blocks = kRole == Role::kKeys
                       ? blocks_of(problem, problem.mask.keys, problem.heads_k, BackwardTiles<kD>::kRows)
                       : blocks_of(problem, problem.mask.queries, problem.heads_q, BackwardTiles<kD>::kRows);
  launch(target, "attention_backward", attention_f32_bwd_kernel<kD, kRole>, grid_of(blocks), kThreads,
         BackwardTiles<kD>::kSharedBytes, args);
}

}  // namespace

void forward_f32(const Target& target, const ForwardArgs& args) {
  dispatch_width(args.problem, [&](auto width) {
    constexpr int kD = decltype(width)::value;
    int64_t blocks =
        blocks_of(args.problem, args.problem.mask.queries, args.problem.heads_q, ForwardTiles<kD>::kRows);
    launch(target, "attention", attention_f32_fwd_kernel<kD>, grid_of(blocks), kThreads, ForwardTiles<kD>::kSharedBytes,
           args);
  });
}

void backward_f32(const Target& target, const BackwardArgs& args) {
  dispatch_width(args.problem, [&](auto width) {
    constexpr int kD = decltype(width)::value;
    if (args.dq.data != nullptr) launch_backward<kD, Role::kQueries>(target, args);
    if (args.dk.data != nullptr) launch_backward<kD, Role::kKeys>(target, args);
  });
}

}  // namespace fastlm::cuda::attention
