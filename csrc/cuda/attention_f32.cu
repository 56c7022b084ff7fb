// Attention in fp32 arithmetic without tensor cores, forward and backward: float32 on every device (never rounded to
// TF32), and all dtypes on devices older than sm_80. Tensors of 16-bit dtypes are widened as they are loaded.
//
// The tiling is that of attention_mma.cuh. A block has 16 x 16 threads: thread (y, x) computes rows y, y + 16, ... of every
// product, columns x, x + 16, ... of scores and columns 4 x ... 4 x + 3, 4 x + 64 ... of outputs. Rows of tiles are padded
// by four floats, so that the 16-byte reads of eight neighbouring rows fall into different banks.
#include "attention.cuh"

namespace fastlm::cuda::attention {
namespace {

constexpr int kSide = 16;
constexpr int kThreads = kSide * kSide;
constexpr int kPad = 4;

// --- tiles ------------------------------------------------------------------------------------------------------------
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

template <int kD, bool kTerms>
__global__ void __launch_bounds__(kThreads, kTerms ? 1 : 2) attention_f32_fwd_kernel(const ForwardArgs args) {
  constexpr int kRows = ForwardTiles<kD>::kRows, kCols = ForwardTiles<kD>::kCols;
  constexpr int kOwnRows = kRows / kSide, kOwnCols = kCols / kSide;
  const Problem& problem = args.problem;
  const Block block = block_of(problem, blockIdx.x, false, kRows);
  const Mask& mask = block.mask;
  int q0 = block.first;
  if (q0 >= mask.queries) return;
  const Scores<kTerms> scores(problem, block, block.head);
  int tx = threadIdx.x % kSide, ty = threadIdx.x / kSide;

  float* tile_q = reinterpret_cast<float*>(dynamic_shared());
  float* tile_kv = tile_q + kRows * (kD + kPad);  // first the keys, then the values
  float* tile_p = tile_kv + kCols * (kD + kPad);
  int64_t k = block.at_key(args.k, block.head_k), v = block.at_key(args.v, block.head_k);

  float acc[kOwnRows][kD / 64][4] = {};
  float max[kOwnRows], sum[kOwnRows] = {};  // sum: this thread's columns
#pragma unroll
  for (int i = 0; i < kOwnRows; ++i) max[i] = -INFINITY;
  int begin = mask.key_begin(q0) / kCols * kCols, end = mask.key_end(q0, kRows);
  load_tile<kRows, kD>(tile_q, args.q, problem.dtype, block.at_query(args.q, block.head), q0, mask.queries,
                       problem.width, args.aligned);
  for (int k0 = begin; k0 < end; k0 += kCols) {
    load_tile<kCols, kD>(tile_kv, args.k, problem.dtype, k, k0, mask.keys, problem.width, args.aligned);
    __syncthreads();
    float s[kOwnRows][kOwnCols];
    product_transposed<kOwnRows, kOwnCols, kD>(s, tile_q, tile_kv);
    bool whole = scores.whole(q0, kRows, k0, kCols);
    auto seen = [&](int row, int col) { return whole || scores.visible(q0 + row, k0 + col); };
#pragma unroll
    for (int i = 0; i < kOwnRows; ++i) {
      int row = ty + kSide * i;
      float new_max = max[i];
#pragma unroll
      for (int j = 0; j < kOwnCols; ++j) {
        int col = tx + kSide * j;
        s[i][j] = seen(row, col) ? scores.score(s[i][j], q0 + row, k0 + col) : -INFINITY;
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
        if constexpr (kTerms) p = kept(p, scores.keep(q0 + row, k0 + tx + kSide * j));
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
    factor[i] = 1.0f;
    if constexpr (kTerms) factor[i] = add_sink(problem, block, max[i], sum[i]);
    factor[i] *= final_factor(sum[i]);
    int row = q0 + ty + kSide * i;
    if (tx == 0 && row < mask.queries) {
      args.lse[block.query_number(problem, block.head, row)] = final_lse(max[i], sum[i]);
    }
  }
  store_rows<kOwnRows, kD>(args.o, problem.dtype, block.at_query(args.o, block.head), acc, factor, q0, mask.queries,
                           problem.width_v);
}

// --- backward ---------------------------------------------------------------------------------------------------------
enum class Role { kQueries, kKeys };  // what a block owns; see attention_mma_backward.cu

template <int kD> struct BackwardTiles {  // up to 128 columns within the 64 KB of sm_75
  static constexpr int kRows = kD == 256 ? 16 : 32;
  static constexpr int kCols = kD == 64 ? 32 : 16;
  static constexpr int kSharedBytes = 4 * (2 * (kRows + kCols) * (kD + kPad) + 2 * kRows * (kCols + 1));
};

template <int kD, Role kRole, bool kTerms>
__global__ void __launch_bounds__(kThreads, kTerms ? 1 : 2) attention_f32_bwd_kernel(const BackwardArgs args) {
  constexpr int kRows = BackwardTiles<kD>::kRows, kCols = BackwardTiles<kD>::kCols;
  constexpr int kOwnRows = kRows / kSide, kOwnCols = kCols / kSide;
  constexpr bool kKeys = kRole == Role::kKeys;
  const Problem& problem = args.problem;
  const Block block = block_of(problem, blockIdx.x, kKeys, kRows);
  const Mask& mask = block.mask;
  int group = problem.heads_q / problem.heads_k;
  int rows = kKeys ? mask.keys : mask.queries, cols = kKeys ? mask.queries : mask.keys;
  int r0 = block.first;
  if (r0 >= rows) return;
  int tx = threadIdx.x % kSide, ty = threadIdx.x / kSide;

  float* x1 = reinterpret_cast<float*>(dynamic_shared());
  float* x2 = x1 + kRows * (kD + kPad);
  float* y1 = x2 + kRows * (kD + kPad);
  float* y2 = y1 + kCols * (kD + kPad);
  float* tile_p = y2 + kCols * (kD + kPad);
  float* tile_ds = tile_p + kRows * (kCols + 1);
  const Operand &op_x1 = kKeys ? args.k : args.q, &op_x2 = kKeys ? args.v : args.d_o;
  const Operand &op_y1 = kKeys ? args.q : args.k, &op_y2 = kKeys ? args.d_o : args.v;
  // Rows of this sequence: of what the block owns, and of what it walks over.
  auto own = [&](const Operand& x) { return kKeys ? block.at_key(x, block.head) : block.at_query(x, block.head); };
  auto walked = [&](const Operand& x, int64_t head) { return kKeys ? block.at_query(x, head) : block.at_key(x, head); };
  load_tile<kRows, kD>(x1, op_x1, problem.dtype, own(op_x1), r0, rows, problem.width, args.aligned);
  load_tile<kRows, kD>(x2, op_x2, problem.dtype, own(op_x2), r0, rows, problem.width_v, args.aligned);

  float acc1[kOwnRows][kD / 64][4] = {}, acc2[kOwnRows][kD / 64][4] = {};  // dq or dk; dv
  float dslopes[kOwnRows] = {};  // this thread's columns
  int c_begin = (kKeys ? mask.query_begin(r0) : mask.key_begin(r0)) / kCols * kCols;
  int c_end = kKeys ? mask.query_end(r0, kRows) : mask.key_end(r0, kRows);
  for (int member = 0; member < (kKeys ? group : 1); ++member) {
    int64_t head_y = kKeys ? block.head * group + member : block.head_k, head_q = kKeys ? head_y : block.head;
    const Scores<kTerms> scores(problem, block, head_q);
    const float2* stats = args.stats + block.query_number(problem, head_q, 0);
    for (int c0 = c_begin; c0 < c_end; c0 += kCols) {
      load_tile<kCols, kD>(y1, op_y1, problem.dtype, walked(op_y1, head_y), c0, cols, problem.width, args.aligned);
      load_tile<kCols, kD>(y2, op_y2, problem.dtype, walked(op_y2, head_y), c0, cols, problem.width_v, args.aligned);
      __syncthreads();
      float s[kOwnRows][kOwnCols], dp[kOwnRows][kOwnCols];
      product_transposed<kOwnRows, kOwnCols, kD>(s, x1, y1);
      product_transposed<kOwnRows, kOwnCols, kD>(dp, x2, y2);
      bool whole = kKeys ? scores.whole(c0, kCols, r0, kRows) : scores.whole(r0, kRows, c0, kCols);
      auto seen = [&](int row, int col) {
        return whole || (kKeys ? scores.visible(c0 + col, r0 + row) : scores.visible(r0 + row, c0 + col));
      };
#pragma unroll
      for (int i = 0; i < kOwnRows; ++i) {
#pragma unroll
        for (int j = 0; j < kOwnCols; ++j) {
          int row = ty + kSide * i, col = tx + kSide * j;
          int query = kKeys ? c0 + col : r0 + row, key = kKeys ? r0 + row : c0 + col;
          float p = 0, ds = 0;
          if (query < mask.queries && seen(row, col)) {
            p = exp2_approx(scores.score(s[i][j], query, key) - stats[query].x);
            if constexpr (kTerms) {
              float keep = scores.keep(query, key);
              ds = p * (kept(dp[i][j], keep) - stats[query].y);
              p = kept(p, keep);
              if (!kKeys && args.dbias != nullptr) args.dbias[scores.element(query, key)] = ds;
              dslopes[i] -= ds * scores.distance(query, key);
              ds *= scores.slope_of_cap(s[i][j]);
            } else {
              ds = p * (dp[i][j] - stats[query].y);
            }
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
    store_rows<kOwnRows, kD>(out, problem.dtype, own(out), acc, factor, r0, rows, width);
  };
  store(kKeys ? args.dk : args.dq, acc1, problem.scale, problem.width);
  if constexpr (kKeys) store(args.dv, acc2, 1.0f, problem.width_v);
  if constexpr (kTerms && !kKeys) {
    if (args.dslopes != nullptr) {
#pragma unroll
      for (int i = 0; i < kOwnRows; ++i) {
        float sum = lanes_sum<kSide>(dslopes[i]);
        int row = r0 + ty + kSide * i;
        if (tx == 0 && row < rows) args.dslopes[block.query_number(problem, block.head, row)] = sum;
      }
    }
  }
}

// --- launch -----------------------------------------------------------------------------------------------------------
template <int kD, Role kRole, bool kTerms> void launch_role(const Target& target, const BackwardArgs& args) {
  launch(target, "attention_backward", attention_f32_bwd_kernel<kD, kRole, kTerms>,
         grid_of(blocks_of(args.problem, kRole == Role::kKeys, BackwardTiles<kD>::kRows)), kThreads,
         BackwardTiles<kD>::kSharedBytes, args);
}

}  // namespace

void forward_f32(const Target& target, const ForwardArgs& args) {
  dispatch_kernel<64, 128, 256>(args.problem, [&](auto width, auto terms) {
    constexpr int kD = decltype(width)::value;
    launch(target, "attention", attention_f32_fwd_kernel<kD, decltype(terms)::value>,
           grid_of(blocks_of(args.problem, false, ForwardTiles<kD>::kRows)), kThreads, ForwardTiles<kD>::kSharedBytes, args);
  });
}

void backward_f32(const Target& target, const BackwardArgs& args) {
  dispatch_kernel<64, 128, 256>(args.problem, [&](auto width, auto terms) {
    constexpr int kD = decltype(width)::value;
    constexpr bool kTerms = decltype(terms)::value;
    if (args.dq.data != nullptr) launch_role<kD, Role::kQueries, kTerms>(target, args);
    if (args.dk.data != nullptr) launch_role<kD, Role::kKeys, kTerms>(target, args);
  });
}

}  // namespace fastlm::cuda::attention
