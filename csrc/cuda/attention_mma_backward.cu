// The backward of attention on tensor cores: see attention_mma.cuh. One kernel in two roles, without atomics and hence with
// the same bits every time: a block owns 64 queries and walks over keys (dq), or owns 64 keys and walks over queries, of all
// query heads of its group (dk and dv). Scores are computed in both: 7 products instead of the 5 that atomics would need.
#include "attention_mma.cuh"

namespace fastlm::cuda::attention {
namespace {

enum class Role { kQueries, kKeys };  // what a block owns

template <int kD, Role kRole> struct BackwardTiles {
  static constexpr int kCols = kD == 64 ? 64 : kD <= 128 ? 32 : 16;
  // Columns of the gradient that a block computes: more of dk and dv would not fit into registers.
  static constexpr int kOut = kD > 128 && kRole == Role::kKeys ? kD / 2 : kD;
  static constexpr int kStages = 2;
  static constexpr int kSharedBytes = (2 * kRows + kStages * 2 * kCols) * kD * 2 + kStages * kCols * int(sizeof(float2));
};

// Owned tiles x1, x2 and streamed tiles y1, y2 are (q, d_o) and (k, v), or (k, v) and (q, d_o). Then S = x1 y1^T and
// dP = x2 y2^T, both transposed in the second role, and the gradients are dS y1 (dq or dk) and P^T y2 (dv).
template <class T, int kD, Role kRole, bool kTerms>
__global__ void __launch_bounds__(kThreads, 2) attention_bwd_kernel(const BackwardArgs args) {
  using Tiles = BackwardTiles<kD, kRole>;
  constexpr int kCols = Tiles::kCols, kOut = Tiles::kOut;
  constexpr bool kKeys = kRole == Role::kKeys;
  const Problem& problem = args.problem;
  const Block block = block_of(problem, blockIdx.x, kKeys, kRows);
  const Mask& mask = block.mask;
  int group = problem.heads_q / problem.heads_k;
  int rows = kKeys ? mask.keys : mask.queries, cols = kKeys ? mask.queries : mask.keys;
  int r0 = block.first;
  if (r0 >= rows) return;
  int chunk0 = blockIdx.y * (kOut / 8);

  T* x1 = reinterpret_cast<T*>(dynamic_shared());
  T* x2 = x1 + kRows * kD;
  T* y = x2 + kRows * kD;  // per stage: y1, y2
  float2* col_stats = reinterpret_cast<float2*>(y + Tiles::kStages * 2 * kCols * kD);
  const Operand &op_x1 = kKeys ? args.k : args.q, &op_x2 = kKeys ? args.v : args.d_o;
  const Operand &op_y1 = kKeys ? args.q : args.k, &op_y2 = kKeys ? args.d_o : args.v;
  // Rows of this sequence: of what the block owns, and of what it walks over.
  auto own = [&](const Operand& x) { return kKeys ? block.at_key(x, block.head) : block.at_query(x, block.head); };
  auto walked = [&](const Operand& x, int64_t head) { return kKeys ? block.at_query(x, head) : block.at_key(x, head); };

  // Streamed tiles: for keys those of every query head of the group, one head after the other.
  int c_begin = (kKeys ? mask.query_begin(r0) : mask.key_begin(r0)) / kCols * kCols;
  int c_end = kKeys ? mask.query_end(r0, kRows) : mask.key_end(r0, kRows);
  int per_head = c_end > c_begin ? (c_end - c_begin + kCols - 1) / kCols : 0;
  int steps = per_head * (kKeys ? group : 1);
  auto head_of = [&](int step) { return kKeys ? block.head * group + step / per_head : block.head_k; };
  auto column_of = [&](int step) { return c_begin + step % per_head * kCols; };
  auto load_step = [&](int step) {
    if (step < steps) {
      int64_t head_y = head_of(step);
      int c0 = column_of(step);
      T* y1 = y + step % Tiles::kStages * (2 * kCols * kD);
      load_tile<T, kCols, kD>(y1, static_cast<const T*>(op_y1.data) + walked(op_y1, head_y), op_y1.row, c0, cols,
                              problem.width, args.aligned);
      load_tile<T, kCols, kD>(y1 + kCols * kD, static_cast<const T*>(op_y2.data) + walked(op_y2, head_y), op_y2.row,
                              c0, cols, problem.width_v, args.aligned);
      if (kKeys && threadIdx.x < kCols) {
        int c = c0 + threadIdx.x;
        const float2* stats = args.stats + block.query_number(problem, head_y, 0);
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
      if (row < rows) row_stats[half] = args.stats[block.query_number(problem, block.head, row)];
    }
  }
  float acc1[kOut / 8][4] = {};              // dq or dk
  float acc2[kKeys ? kOut / 8 : 1][4] = {};  // dv
  float dslopes[2] = {};                     // of rows lane / 4 and lane / 4 + 8: this lane's columns

  load_tile<T, kRows, kD>(x1, static_cast<const T*>(op_x1.data) + own(op_x1), op_x1.row, r0, rows, problem.width,
                          args.aligned);
  load_tile<T, kRows, kD>(x2, static_cast<const T*>(op_x2.data) + own(op_x2), op_x2.row, r0, rows, problem.width_v,
                          args.aligned);
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

    const Scores<kTerms> scores(problem, block, kKeys ? head_of(step) : block.head);
    auto visible = [&](int row, int col) {
      return kKeys ? c0 + col < cols && scores.visible(c0 + col, row0 + row) : scores.visible(row0 + row, c0 + col);
    };
    bool whole = kKeys ? c0 + kCols <= cols && scores.whole(c0, kCols, r0, kRows) : scores.whole(r0, kRows, c0, kCols);
#pragma unroll
    for (int n = 0; n < kCols / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float2 stats = kKeys ? col_stats[step % Tiles::kStages * kCols + 8 * n + acc_col(lane, e)] : row_stats[e / 2];
        int row = acc_row(lane, e), col = 8 * n + acc_col(lane, e);
        int i = kKeys ? c0 + col : row0 + row, j = kKeys ? row0 + row : c0 + col;
        if (!whole && !visible(row, col)) {
          p[n][e] = ds[n][e] = 0.0f;
          continue;
        }
        float raw = p[n][e];
        p[n][e] = exp2_approx(scores.score(raw, i, j) - stats.x);
        if constexpr (kTerms) {
          float keep = scores.keep(i, j);
          ds[n][e] = p[n][e] * (kept(ds[n][e], keep) - stats.y);
          if (keep == 0.0f) p[n][e] = 0.0f;
          if (!kKeys && i < mask.queries) {
            if (args.dbias != nullptr) args.dbias[scores.element(i, j)] = ds[n][e];
            dslopes[e / 2] -= ds[n][e] * scores.distance(i, j);
          }
          ds[n][e] *= scores.slope_of_cap(raw);
        } else {
          ds[n][e] = p[n][e] * (ds[n][e] - stats.y);
        }
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
    T* to = static_cast<T*>(const_cast<void*>(out.data)) + own(out) + 8 * chunk0;
    store_rows<T, kD, kOut>(tile, acc, factor, factor, to, out.row, r0, rows, width - 8 * chunk0, args.aligned);
  };
  store(x1, acc1, problem.scale, kKeys ? args.dk : args.dq, problem.width);
  if constexpr (kKeys) store(x2, acc2, Scores<kTerms>(problem, block, 0).keep_scale(), args.dv, problem.width_v);
  if constexpr (kTerms && !kKeys) {
    if (args.dslopes != nullptr) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float sum = lanes_sum<4>(dslopes[half]);
        int row = row0 + acc_row(lane, 2 * half);
        if (lane % 4 == 0 && row < rows) args.dslopes[block.query_number(problem, block.head, row)] = sum;
      }
    }
  }
}

// --- launch -----------------------------------------------------------------------------------------------------------
template <class T, int kD, Role kRole, bool kTerms> void launch_role(const Target& target, const BackwardArgs& args) {
  using Tiles = BackwardTiles<kD, kRole>;
  dim3 grid = grid_of(blocks_of(args.problem, kRole == Role::kKeys, kRows));
  grid.y = kD / Tiles::kOut;
  launch(target, "attention_backward", attention_bwd_kernel<T, kD, kRole, kTerms>, grid, kThreads, Tiles::kSharedBytes, args);
}

}  // namespace

void backward_mma(const Target& target, const BackwardArgs& args) {
  dispatch_mma(args.problem, [&](auto tag, auto width, auto terms) {
    using T = typename decltype(tag)::type;
    constexpr int kD = decltype(width)::value;
    constexpr bool kTerms = decltype(terms)::value;
    if (args.dq.data != nullptr) launch_role<T, kD, Role::kQueries, kTerms>(target, args);
    if (args.dk.data != nullptr) launch_role<T, kD, Role::kKeys, kTerms>(target, args);
  });
}

}  // namespace fastlm::cuda::attention
