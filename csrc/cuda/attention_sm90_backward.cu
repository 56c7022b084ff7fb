// The backward of attention on Hopper, in fp16 and bf16. As in attention_mma_backward.cu one kernel in two roles, without
// atomics: a block owns 128 queries and walks over keys (dq), or owns 128 keys and walks over queries, of all query heads
// of its group (dk and dv). One warpgroup has the copy engine fetch the tiles that are walked over; each of two others
// computes 64 of the owned rows: P and dS go from the accumulators of two products straight into the operands of the
// next. While one waits for its products, the other computes exponentials.
//
// Head dims are padded with zeros to 64 or 128. Scores are scaled products alone (no ScoreTerms).
#include "attention_sm90.cuh"

namespace fastlm::cuda::attention {
namespace {

enum class Role { kQueries, kKeys };  // what a block owns

struct Sm90BackwardArgs {
  TensorMap x1, x2, y1, y2;  // as in attention_mma_backward.cu: (q, d_o) and (k, v), or (k, v) and (q, d_o)
  BackwardArgs backward;
  int64_t tiles;
};

struct BackwardBarriers {
  TileBarrier x_full, x_empty, y_full[kStages], y_empty[kStages];
};

template <int kD, Role kRole> struct Sm90BackwardTiles {
  static constexpr int kCols = 64;  // that are walked over at a time
  // Start the next scores beside these sums, where there are registers for both.
  static constexpr bool kAhead = kD == 64 || kRole == Role::kQueries;
  static constexpr int kOwned = kTileRows * kD, kWalked = kCols * kD;  // elements of a tile
  static constexpr int kSharedBytes =
      2 * (2 * kOwned + 2 * kStages * kWalked) + int(sizeof(BackwardBarriers)) + kTileAlignment;
};

// The tiles that a block walks over: for keys those of every query head of the group, one head after the other.
template <int kCols, Role kRole> struct Walk {
  static constexpr bool kKeys = kRole == Role::kKeys;
  int begin, end, left;  // columns of a head; tiles that are left
  int column, head;      // of the tile at hand: its first column, and how many heads were before

  __device__ Walk(const Problem& problem, const Block& block) {
    const Mask& mask = block.mask;
    begin = (kKeys ? mask.query_begin(block.first) : mask.key_begin(block.first)) / kCols * kCols;
    end = kKeys ? mask.query_end(block.first, kTileRows) : mask.key_end(block.first, kTileRows);
    left = end > begin ? (end - begin + kCols - 1) / kCols * (kKeys ? problem.heads_q / problem.heads_k : 1) : 0;
    column = begin, head = 0;
  }
  __device__ void next() {
    --left;
    column += kCols;
    if (column >= end) column = begin, ++head;
  }
};

// One row of gradients anew, term by term and without what it does not see, where it came out as no number: see
// attention_sm90_forward.cu.
template <class T, int kD, Role kRole>
__device__ void add_up_anew(const BackwardArgs& args, const Block& block, int row, T* tile1, T* tile2, int tile_row) {
  constexpr bool kKeys = kRole == Role::kKeys;
  const Problem& problem = args.problem;
  const Mask& mask = block.mask;
  int lane = threadIdx.x % kWarp, group = problem.heads_q / problem.heads_k;
  float scale = problem.scale * kLog2e;
  auto query_row = [&](const Operand& x, int64_t head, int i) {
    return static_cast<const T*>(x.data) + block.at_query(x, head) + i * x.row;
  };
  auto key_row = [&](const Operand& x, int j) { return static_cast<const T*>(x.data) + block.at_key(x, block.head_k) + j * x.row; };
  auto at = [&](const T* from, int c, int width) { return lane + kWarp * c < width ? widen(from[lane + kWarp * c]) : 0.0f; };
  float sums1[kD / kWarp] = {}, sums2[kD / kWarp] = {};
  for (int member = 0; member < (kKeys ? group : 1); ++member) {
    int64_t head = kKeys ? block.head * group + member : block.head;
    for (int col = 0; col < (kKeys ? mask.queries : mask.keys); ++col) {
      int i = kKeys ? col : row, j = kKeys ? row : col;
      if (!mask.visible(i, j)) continue;
      const T *q = query_row(args.q, head, i), *d_o = query_row(args.d_o, head, i), *k = key_row(args.k, j), *v = key_row(args.v, j);
      float score = 0, dp = 0;
#pragma unroll
      for (int c = 0; c < kD / kWarp; ++c) {
        score += at(q, c, problem.width) * at(k, c, problem.width);
        dp += at(d_o, c, problem.width_v) * at(v, c, problem.width_v);
      }
      float2 stats = args.stats[block.query_number(problem, head, i)];
      float p = exp2_approx(lanes_sum<kWarp>(score) * scale - stats.x), ds = p * (lanes_sum<kWarp>(dp) - stats.y);
#pragma unroll
      for (int c = 0; c < kD / kWarp; ++c) {
        sums1[c] += ds * at(kKeys ? q : k, c, problem.width);
        if (kKeys) sums2[c] += p * at(d_o, c, problem.width_v);
      }
    }
  }
#pragma unroll
  for (int c = 0; c < kD / kWarp; ++c) {
    int col = lane + kWarp * c, to = box_offset(tile_row, col / 8, kTileRows) + col % 8;
    tile1[to] = narrow<T>(sums1[c] * problem.scale);
    if (kKeys) tile2[to] = narrow<T>(sums2[c]);
  }
}

template <class T, int kD, Role kRole>
__device__ void consume(const Sm90BackwardArgs& args, int group, T* x1, T* x2, T* y, BackwardBarriers* bars) {
  using Tiles = Sm90BackwardTiles<kD, kRole>;
  constexpr int kCols = Tiles::kCols;
  constexpr bool kKeys = kRole == Role::kKeys;
  const BackwardArgs& backward = args.backward;
  const Problem& problem = backward.problem;
  int lane = threadIdx.x % kWarp, warp_row = 64 * group + threadIdx.x % kWarpgroup / kWarp * 16;
  float scale = problem.scale * kLog2e;
  int turn = 0, done = 0;  // owned tiles and walked ones so far
  auto done_with = [&](TileBarrier* empty) {
    if (lane == 0) barrier_arrive(empty);
  };

  for (int64_t index = blockIdx.x; index < args.tiles; index += gridDim.x) {
    const Block block = block_of(problem, index, kKeys, kTileRows);
    const Mask& mask = block.mask;
    int rows = kKeys ? mask.keys : mask.queries, cols = kKeys ? mask.queries : mask.keys;
    int r0 = block.first, row0 = r0 + warp_row;
    if (r0 >= rows) continue;
    Walk<kCols, kRole> walk(problem, block);
    // Of the owned queries, or of the first head that is walked over.
    const float2* stats =
        backward.stats + block.query_number(problem, kKeys ? block.head * (problem.heads_q / problem.heads_k) : block.head, 0);
    float2 row_stats[2] = {};
    if (!kKeys) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int row = row0 + acc_row(lane, 2 * half);
        if (row < rows) row_stats[half] = stats[row];
      }
    }
    float acc1[kD / 8][4] = {};              // dq or dk
    float acc2[kKeys ? kD / 8 : 1][4] = {};  // dv
    float p[kCols / 8][4], ds[kCols / 8][4];
    uint32_t p_operand[kKeys ? kCols / 16 : 1][4], ds_operand[kCols / 16][4];

    auto start_scores = [&](int at) {
      const T* y1 = y + at % kStages * 2 * Tiles::kWalked;
      barrier_wait(&bars->y_full[at % kStages], at / kStages % 2);
      wgmma_fence();
      start_transposed<T, kD, kCols>(p, x1 + 64 * group * 64, y1);
      start_transposed<T, kD, kCols>(ds, x2 + 64 * group * 64, y1 + Tiles::kWalked);
      wgmma_commit();
    };
    // P and dS of the tile at hand from its two products.
    auto weigh = [&] {
      int c0 = walk.column;
      const float2* of_head = stats + int64_t(walk.head) * problem.queries;
      bool whole = kKeys ? c0 + kCols <= cols && mask.whole(c0, kCols, r0, kTileRows) : mask.whole(r0, kTileRows, c0, kCols);
#pragma unroll
      for (int j = 0; j < kCols / 16; ++j) {
        keep_order();  // else all statistics would be loaded first, into as many registers
#pragma unroll
        for (int n = 2 * j; n < 2 * j + 2; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            int row = row0 + acc_row(lane, e), col = c0 + 8 * n + acc_col(lane, e);
            float2 of_query = row_stats[e / 2];
            if constexpr (kKeys) of_query = col < cols ? of_head[col] : make_float2(INFINITY, 0.0f);
            bool seen = whole || (kKeys ? col < cols && mask.visible(col, row) : mask.visible(row, col));
            p[n][e] = seen ? exp2_approx(p[n][e] * scale - of_query.x) : 0.0f;
            ds[n][e] = seen ? p[n][e] * (ds[n][e] - of_query.y) : 0.0f;
          }
        }
        as_operand<T>(ds_operand[j], ds[2 * j], ds[2 * j + 1]);  // at once, which frees their registers
        if constexpr (kKeys) as_operand<T>(p_operand[j], p[2 * j], p[2 * j + 1]);
      }
    };
    auto start_sums = [&] {
      const T* y1 = y + done % kStages * 2 * Tiles::kWalked;
      wgmma_fence();
      start_product<T, kD, kCols>(acc1, ds_operand, y1);
      if constexpr (kKeys) start_product<T, kD, kCols>(acc2, p_operand, y1 + Tiles::kWalked);
      wgmma_commit();
    };
    auto wait_for_sums = [&] {
      wgmma_wait<0>();
      pin(acc1);
      if constexpr (kKeys) pin(acc2);
      done_with(&bars->y_empty[done % kStages]);
    };

    barrier_wait(&bars->x_full, turn % 2);
    if (walk.left > 0) {
      start_scores(done);
      wgmma_wait<0>();
      pin(p);
      pin(ds);
      for (; walk.left > 1; walk.next(), ++done) {
        weigh();
        start_sums();
        if constexpr (!Tiles::kAhead) wait_for_sums();
        start_scores(done + 1);
        if constexpr (Tiles::kAhead) {
          wait_for_sums();
        } else {
          wgmma_wait<0>();
        }
        pin(p);
        pin(ds);
      }
      weigh();
      start_sums();
      wait_for_sums();
      ++done;
    }

    put_rows<T, kD>(x1, warp_row, acc1, problem.scale, problem.scale);
    bool nonfinite = warp_has_nonfinite(acc1);
    if constexpr (kKeys) {
      put_rows<T, kD>(x2, warp_row, acc2, 1.0f, 1.0f);
      nonfinite = warp_has_nonfinite(acc2) || nonfinite;
    }
    sync_warp();
    const Block again = block_of(problem, afresh(index), kKeys, kTileRows);
    int first = again.first + warp_row, last = kKeys ? again.mask.keys : again.mask.queries;
    if (nonfinite) {
      for (int row = 0; row < 16 && first + row < last; ++row) {
        add_up_anew<T, kD, kRole>(backward, again, first + row, x1, x2, warp_row + row);
      }
      sync_warp();
    }
    auto store = [&](const T* tile, const Operand& out, int width) {
      int64_t from = kKeys ? again.at_key(out, again.head) : again.at_query(out, again.head);
      store_tile_rows<T, kD>(tile, warp_row, static_cast<T*>(const_cast<void*>(out.data)) + from, out.row, first, last, width);
    };
    store(x1, kKeys ? backward.dk : backward.dq, problem.width);
    if constexpr (kKeys) store(x2, backward.dv, problem.width_v);
    fence_async();
    sync_warp();
    done_with(&bars->x_empty);
    ++turn;
  }
}

template <class T, int kD, Role kRole>
__device__ void produce(const Sm90BackwardArgs& args, T* x1, T* x2, T* y, BackwardBarriers* bars) {
  using Tiles = Sm90BackwardTiles<kD, kRole>;
  constexpr int kCols = Tiles::kCols;
  constexpr bool kKeys = kRole == Role::kKeys;
  const Problem& problem = args.backward.problem;
  int turn = 0, done = 0;
  for (int64_t index = blockIdx.x; index < args.tiles; index += gridDim.x) {
    const Block block = block_of(problem, index, kKeys, kTileRows);
    if (block.first >= (kKeys ? block.mask.keys : block.mask.queries)) continue;
    Walk<kCols, kRole> walk(problem, block);
    int64_t first_head = kKeys ? block.head * (problem.heads_q / problem.heads_k) : block.head_k;
    int own0 = kKeys ? block.key0 : block.query0, walked0 = kKeys ? block.query0 : block.key0;
    barrier_wait(&bars->x_empty, turn % 2 ^ 1);
    barrier_arrive_expect(&bars->x_full, 2 * Tiles::kOwned * int(sizeof(T)));
    load_boxes<T, kTileRows, kD>(x1, &args.x1, &bars->x_full, own0 + block.first, block.head, block.batch);
    load_boxes<T, kTileRows, kD>(x2, &args.x2, &bars->x_full, own0 + block.first, block.head, block.batch);
    for (; walk.left > 0; walk.next(), ++done) {
      int stage = done % kStages, row = walked0 + walk.column;
      T* y1 = y + stage * 2 * Tiles::kWalked;
      barrier_wait(&bars->y_empty[stage], done / kStages % 2 ^ 1);
      barrier_arrive_expect(&bars->y_full[stage], 2 * Tiles::kWalked * int(sizeof(T)));
      load_boxes<T, kCols, kD>(y1, &args.y1, &bars->y_full[stage], row, first_head + walk.head, block.batch);
      load_boxes<T, kCols, kD>(y1 + Tiles::kWalked, &args.y2, &bars->y_full[stage], row, first_head + walk.head, block.batch);
    }
    ++turn;
  }
}

template <class T, int kD, Role kRole>
__global__ void __launch_bounds__(kBlockThreads, 1) attention_bwd_sm90_kernel(const __grid_constant__ Sm90BackwardArgs args) {
#ifdef FASTLM_SM90A
  using Tiles = Sm90BackwardTiles<kD, kRole>;
  T* x1 = reinterpret_cast<T*>(aligned_shared());
  T* x2 = x1 + Tiles::kOwned;
  T* y = x2 + Tiles::kOwned;  // per stage: y1, y2
  BackwardBarriers* bars = reinterpret_cast<BackwardBarriers*>(y + 2 * kStages * Tiles::kWalked);
  if (threadIdx.x == 0) {
    barrier_init(&bars->x_full, 1);
    barrier_init(&bars->x_empty, kConsumerWarps);
    for (int stage = 0; stage < kStages; ++stage) {
      barrier_init(&bars->y_full[stage], 1);
      barrier_init(&bars->y_empty[stage], kConsumerWarps);
    }
    barrier_init_done();
  }
  __syncthreads();
  if (threadIdx.x < kWarpgroup) {
    give_registers<kProducerRegisters>();
    if (threadIdx.x == 0) produce<T, kD, kRole>(args, x1, x2, y, bars);
  } else {
    take_registers<kConsumerRegisters>();
    consume<T, kD, kRole>(args, threadIdx.x / kWarpgroup - 1, x1, x2, y, bars);
  }
#elif defined(__CUDA_ARCH__)
  __trap();  // launched where it was not compiled for
#endif
}

// --- launch -----------------------------------------------------------------------------------------------------------
template <class T, int kD, Role kRole> void launch_role(const Target& target, const BackwardArgs& backward) {
  constexpr bool kKeys = kRole == Role::kKeys;
  constexpr int kCols = Sm90BackwardTiles<kD, kRole>::kCols;
  const Problem& p = backward.problem;
  Sm90BackwardArgs args{{}, {}, {}, {}, backward, blocks_of(p, kKeys, kTileRows)};
  auto of_queries = [&](TensorMap* map, const Operand& x, int width, int rows) {
    return make_map(map, x, p.dtype, p.batch, p.heads_q, p.queries, width, rows);
  };
  auto of_keys = [&](TensorMap* map, const Operand& x, int width, int rows) {
    return make_map(map, x, p.dtype, p.batch, p.heads_k, p.keys, width, rows);
  };
  TensorMap *queries[2] = {&args.x1, &args.x2}, *keys[2] = {&args.y1, &args.y2};
  if (kKeys) std::swap(queries, keys);
  int query_rows = kKeys ? kCols : kTileRows, key_rows = kKeys ? kTileRows : kCols;
  if (!of_queries(queries[0], backward.q, p.width, query_rows) || !of_queries(queries[1], backward.d_o, p.width_v, query_rows) ||
      !of_keys(keys[0], backward.k, p.width, key_rows) || !of_keys(keys[1], backward.v, p.width_v, key_rows)) {
    throw std::runtime_error("fastlm: attention_backward: the driver refuses a tensor map");
  }
  launch(target, "attention_backward", attention_bwd_sm90_kernel<T, kD, kRole>,
         grid_of(std::min<int64_t>(args.tiles, processors(target))), kBlockThreads, Sm90BackwardTiles<kD, kRole>::kSharedBytes, args);
}

}  // namespace

bool backward_sm90(const Target& target, const BackwardArgs& backward) {
  const Problem& p = backward.problem;
  if (!sm90_takes(target, p, backward.aligned, attention_bwd_sm90_kernel<f16, 64, Role::kQueries>)) return false;
  for (const Operand* x : {&backward.q, &backward.k, &backward.v, &backward.d_o}) {  // a tensor map has no stride of 0
    bool of_queries = x == &backward.q || x == &backward.d_o;
    if ((p.batch > 1 && x->batch <= 0) || ((of_queries ? p.heads_q : p.heads_k) > 1 && x->head <= 0) ||
        ((of_queries ? p.queries : p.keys) > 1 && x->row <= 0)) {
      return false;
    }
  }
  dispatch_padded<64, 128>(std::max(p.width, p.width_v), [&](auto width) {
    constexpr int kD = decltype(width)::value;
    auto run = [&](auto tag) {
      using T = typename decltype(tag)::type;
      if (backward.dq.data != nullptr) launch_role<T, kD, Role::kQueries>(target, backward);
      if (backward.dk.data != nullptr) launch_role<T, kD, Role::kKeys>(target, backward);
    };
    p.dtype == DType::kF16 ? run(TypeTag<f16>{}) : run(TypeTag<bf16>{});
  });
  return true;
}

}  // namespace fastlm::cuda::attention
