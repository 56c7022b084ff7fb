// The backward of attention on Hopper, in fp16 and bf16. As in attention_mma_backward.cu one kernel in two roles: a block owns
// 128 queries and walks over keys (dq), or owns 128 keys and walks over queries, of all query heads of its group (dk and dv).
// One warpgroup has the copy engine fetch the tiles that are walked over; each of two others computes 64 of the owned rows: P
// and dS go from the accumulators of two products straight into the operands of the next. While one waits for its products,
// the other computes exponentials.
//
// That is 7 products, without atomics. Where gradients need not have the same bits every time, the second role computes dq too,
// and adds it to sums in device memory: 5 products, a kernel that turns the sums into dq, and two warpgroups that go in step.
//
// Head dims are padded with zeros to 64 or 128. Scores are scaled products alone (no ScoreTerms).
#include "attention_sm90.cuh"

namespace fastlm::cuda::attention {
namespace {

enum class Role { kQueries, kKeys, kKeysAndSums };  // what a block owns; with the sums of dq
template <Role kRole> constexpr bool kOwnsKeys = kRole != Role::kQueries;

struct Sm90BackwardArgs {
  TensorMap x1, x2, y1, y2;  // as in attention_mma_backward.cu: (q, d_o) and (k, v), or (k, v) and (q, d_o)
  BackwardArgs backward;
  int tiles;
};

struct BackwardBarriers {
  TileBarrier x_full, x_empty, y_full[kStages], y_empty[kStages];
};

// What each consumer keeps in shared memory, since its loop has no register left for it.
struct alignas(16) ThreadMemory {
  Mask::Span seen[2];  // by its two rows, in columns from its own first one on
  int index, turn;     // of the block, and how many were before
  bool nonfinite;      // whether a sum was no number
};

template <int kD, Role kRole> struct Sm90BackwardTiles {
  static constexpr int kCols = 64;  // that are walked over at a time
  // Start the next scores beside these sums, where there are registers for both.
  static constexpr bool kAhead = kRole == Role::kQueries || (kRole == Role::kKeys && kD == 64);
  // Elements of a tile, the last of dS by keys and queries: two, in turn.
  static constexpr int kOwned = kTileRows * kD, kWalked = kCols * kD, kScores = kRole == Role::kKeysAndSums ? kTileRows * kCols : 0;
  static constexpr int kElements = 2 * kOwned + 2 * kStages * kWalked + 2 * kScores;
  static constexpr int kStats = kOwnsKeys<kRole> ? kConsumerWarps * kCols : 0;  // of the queries at hand, for each warp
  static constexpr int kSharedBytes = 2 * kElements + kStats * int(sizeof(float2)) +
                                      kConsumers * kWarpgroup * int(sizeof(ThreadMemory)) + int(sizeof(BackwardBarriers));
};

// Where they lie.
template <class T, int kD, Role kRole> struct BackwardMemory {
  using Tiles = Sm90BackwardTiles<kD, kRole>;
  T *x1, *x2;
  T* y;  // per stage: y1, y2
  T* scores;
  float2* stats;
  ThreadMemory* own;
  BackwardBarriers* bars;

  __device__ explicit BackwardMemory(char* base) {
    x1 = reinterpret_cast<T*>(base);
    x2 = x1 + Tiles::kOwned;
    y = x2 + Tiles::kOwned;
    scores = y + 2 * kStages * Tiles::kWalked;
    stats = reinterpret_cast<float2*>(x1 + Tiles::kElements);
    own = reinterpret_cast<ThreadMemory*>(stats + Tiles::kStats);
    bars = reinterpret_cast<BackwardBarriers*>(own + kConsumers * kWarpgroup);
  }
};

// The tiles that a block walks over: for keys those of every query head of the group, one head after the other.
template <int kCols, Role kRole> struct Walk {
  static constexpr bool kKeys = kOwnsKeys<kRole>;
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

template <class T, bool kKeys> __device__ T* row_of(const Operand& out, const Block& block, int row) {
  int64_t from = kKeys ? block.at_key(out, block.head) : block.at_query(out, block.head);
  return static_cast<T*>(const_cast<void*>(out.data)) + from + row * out.row;
}

// One row of gradients anew, term by term and without what it does not see: see attention_sm90_forward.cu.
template <class T, int kD, bool kKeys>
__device__ void add_up_anew(const BackwardArgs& args, const Block& block, int row) {
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
  T* out1 = row_of<T, kKeys>(kKeys ? args.dk : args.dq, block, row);
  T* out2 = kKeys ? row_of<T, kKeys>(args.dv, block, row) : nullptr;
#pragma unroll
  for (int c = 0; c < kD / kWarp; ++c) {
    int col = lane + kWarp * c;
    if (col < problem.width) out1[col] = narrow<T>(sums1[c] * problem.scale);
    if (kKeys && col < problem.width_v) out2[col] = narrow<T>(sums2[c]);
  }
}

template <class T, int kD, Role kRole>
__device__ void consume(const Sm90BackwardArgs& args, int group, const BackwardMemory<T, kD, kRole>& memory) {
  using Tiles = Sm90BackwardTiles<kD, kRole>;
  constexpr int kCols = Tiles::kCols;
  constexpr bool kKeys = kOwnsKeys<kRole>, kSums = kRole == Role::kKeysAndSums;
  BackwardBarriers* bars = memory.bars;
  const BackwardArgs& backward = args.backward;
  const Problem& problem = backward.problem;
  int lane = threadIdx.x % kWarp, warp_row = 64 * group + threadIdx.x % kWarpgroup / kWarp * 16;
  float scale = problem.scale * kLog2e;
  // What is added to dq: at 128 columns each warpgroup computes half of them over all keys, at 64 all over its own keys.
  constexpr bool kByColumns = kD == 128;
  const int first_key = kByColumns ? 0 : 64 * group, box = kByColumns ? group : 0;
  auto meet = [&] { kSums && kByColumns ? group_sync(1, kConsumers * kWarpgroup) : group_sync(1 + group, kWarpgroup); };
  int done = 0;  // tiles walked over so far
  ThreadMemory& own = memory.own[threadIdx.x - kWarpgroup];
  own.turn = 0, own.nonfinite = false;
  auto done_with = [&](TileBarrier* empty) {
    if (lane == 0) barrier_arrive(empty);
  };

  for (int index = blockIdx.x; index < args.tiles; index = own.index + gridDim.x) {
    own.index = index;
    const Block block = block_of(problem, index, kKeys, kTileRows);
    const Mask& mask = block.mask;
    int rows = kKeys ? mask.keys : mask.queries, cols = kKeys ? mask.queries : mask.keys;
    int r0 = block.first, row0 = r0 + warp_row;
    if (r0 >= rows) continue;
    Walk<kCols, kRole> walk(problem, block);
    // What a row of the tile sees, in columns.
    auto span = [&](int row) { return kKeys ? mask.queries_of(row) : mask.keys_of(row); };
    const Mask::Span seen_by_all = span(r0).both(span(r0 + kTileRows - 1));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Mask::Span of_row = span(row0 + acc_row(lane, 2 * half));
      own.seen[half] = {of_row.begin - acc_col(lane, 0), of_row.end - acc_col(lane, 0)};
    }
    // Of the first query of the sequence, for keys in the first head of the group.
    const int64_t number0 =
        block.query_number(problem, kKeys ? block.head * (problem.heads_q / problem.heads_k) : block.head, 0);
    auto number = [&] { return number0 + int64_t(walk.head) * problem.queries + walk.column; };  // that comes first in the tile
    float2 row_stats[2] = {};
    if (!kKeys) {
      const float2* stats = backward.stats + number0;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int row = row0 + acc_row(lane, 2 * half);
        if (row < rows) row_stats[half] = stats[row];
      }
    }
    float acc1[kD / 8][4] = {};              // dq or dk
    float acc2[kKeys ? kD / 8 : 1][4] = {};  // dv
    float sums[8][4];                        // what is added to dq: 64 queries, 64 columns
    float p[kCols / 8][4], ds[kCols / 8][4];
    uint32_t p_operand[kKeys ? kCols / 16 : 1][4], ds_operand[kCols / 16][4];

    float2* stats = memory.stats + (kKeys ? warp_row / 16 * kCols : 0);
    auto start_scores = [&](int at) {
      if constexpr (kKeys) {  // statistics of the queries that come next
        const float2* from = backward.stats + number();
        sync_warp();  // all have read the last
#pragma unroll
        for (int i = 0; i < kCols / kWarp; ++i) {
          int col = lane + kWarp * i;
          bool inside = walk.column + col < cols;
          copy_async<8>(stats + col, from + (inside ? col : 0), inside);
        }
        copy_commit();
      }
      const T* y1 = memory.y + at % kStages * 2 * Tiles::kWalked;
      barrier_wait(&bars->y_full[at % kStages], at / kStages % 2);
      wgmma_fence();
      start_transposed<T, kD, kCols>(p, memory.x1 + 64 * group * 64, y1);
      start_transposed<T, kD, kCols>(ds, memory.x2 + 64 * group * 64, y1 + Tiles::kWalked);
      wgmma_commit();
    };
    // P and dS of the tile at hand from its two products.
    auto weigh = [&] {
      int c0 = walk.column;
      const float2* of_cols = stats + acc_col(lane, 0);
      if constexpr (kKeys) {
        copy_wait<0>();
        sync_warp();
      }
      bool whole = c0 >= seen_by_all.begin && c0 + kCols <= seen_by_all.end;
      if (!whole) {  // by itself, or every element would have a branch
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          int begin = own.seen[half].begin - c0, end = own.seen[half].end - c0;
#pragma unroll
          for (int i = 0; i < kCols / 4; ++i) {
            int n = i / 2, e = 2 * half + i % 2, col = 8 * n + i % 2;
            bool hidden = col < begin || col >= end;
            p[n][e] = hidden ? -INFINITY : p[n][e];
            ds[n][e] = hidden ? 0.0f : ds[n][e];
          }
        }
      }
#pragma unroll
      for (int j = 0; j < kCols / 16; ++j) {
        keep_order();  // else all statistics would be loaded first, into as many registers
#pragma unroll
        for (int n = 2 * j; n < 2 * j + 2; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            float2 of_query = row_stats[e / 2];
            if constexpr (kKeys) of_query = of_cols[8 * n + e % 2];
            p[n][e] = exp2_approx(p[n][e] * scale - of_query.x);
            ds[n][e] = p[n][e] * (ds[n][e] - of_query.y);
          }
        }
        as_operand<T>(ds_operand[j], ds[2 * j], ds[2 * j + 1]);  // at once, which frees their registers
        if constexpr (kKeys) as_operand<T>(p_operand[j], p[2 * j], p[2 * j + 1]);
      }
    };
    auto start_sums = [&] {
      const T* y1 = memory.y + done % kStages * 2 * Tiles::kWalked;
      T* scores = memory.scores + done % 2 * Tiles::kScores;
      if constexpr (kSums) {
#pragma unroll
        for (int j = 0; j < kCols / 16; ++j) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {  // as acc_row and acc_col, for two accumulators side by side
            T* to = scores + box_offset(warp_row + acc_row(lane, 2 * (i % 2)), 2 * j + i / 2, kTileRows) + acc_col(lane, 0);
            *reinterpret_cast<uint32_t*>(to) = ds_operand[j][i];
          }
        }
        fence_async();
        meet();
      }
      wgmma_fence();
      start_product<T, kD, kCols>(acc1, ds_operand, y1);
      if constexpr (kKeys) start_product<T, kD, kCols>(acc2, p_operand, y1 + Tiles::kWalked);
      if constexpr (kSums) {
        start_product_of_rows<T, kByColumns ? kTileRows : 64>(sums, scores + first_key * 64,
                                                                  memory.x1 + (first_key + box * kTileRows) * 64);
      }
      wgmma_commit();
    };
    auto wait_for_sums = [&] {
      wgmma_wait<0>();
      pin(acc1);
      if constexpr (kKeys) pin(acc2);
      if constexpr (kSums) pin(sums);
      done_with(&bars->y_empty[done % kStages]);
      if constexpr (kSums) {
        float* to = backward.dq_sums + number() * problem.width;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          int query = threadIdx.x % kWarpgroup / kWarp * 16 + acc_row(lane, 2 * half);
#pragma unroll
          for (int n = 0; n < 8; ++n) {
            int col = 64 * box + 8 * n + acc_col(lane, 0);
            if (col < problem.width && walk.column + query < mask.queries) add_two(to + query * problem.width + col, sums[n][2 * half], sums[n][2 * half + 1]);
          }
        }
      }
    };

    barrier_wait(&bars->x_full, own.turn % 2);
    if (walk.left > 0) {
      start_scores(done);
      wgmma_wait<0>();
      pin(p);
      pin(ds);
      for (; walk.left > 1; ++done) {
        weigh();
        start_sums();
        if constexpr (!Tiles::kAhead) wait_for_sums();
        walk.next();
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
    meet();  // x1 and x2 are written now, which other warps may still read

    put_rows<T, kD>(memory.x1, warp_row, acc1, problem.scale, problem.scale);
    bool nonfinite = warp_has_nonfinite(acc1);
    if constexpr (kKeys) {
      put_rows<T, kD>(memory.x2, warp_row, acc2, 1.0f, 1.0f);
      nonfinite = warp_has_nonfinite(acc2) || nonfinite;
    }
    sync_warp();
    if (nonfinite) own.nonfinite = true;
    const Block again = block_of(problem, own.index, kKeys, kTileRows);
    int first = again.first + warp_row, last = kKeys ? again.mask.keys : again.mask.queries;
    auto store = [&](const T* tile, const Operand& out, int width) {
      store_tile_rows<T, kD>(tile, warp_row, row_of<T, kKeys>(out, again, 0), out.row, first, last, width);
    };
    store(memory.x1, kKeys ? backward.dk : backward.dq, problem.width);
    if constexpr (kKeys) store(memory.x2, backward.dv, problem.width_v);
    fence_async();
    sync_warp();
    done_with(&bars->x_empty);
    ++own.turn;
  }
  if (!own.nonfinite) return;
  // Rows that came out as no number once more; here, since the loop above has no register left for it.
  for (int index = blockIdx.x; index < args.tiles; index += gridDim.x) {
    const Block block = block_of(problem, index, kKeys, kTileRows);
    int first = block.first + warp_row, last = kKeys ? block.mask.keys : block.mask.queries;
    for (int row = first; row < first + 16 && row < last; ++row) {
      const T* out1 = row_of<T, kKeys>(kKeys ? backward.dk : backward.dq, block, row);
      const T* out2 = kKeys ? row_of<T, kKeys>(backward.dv, block, row) : nullptr;
      bool found = false;
      for (int col = lane; col < kD; col += kWarp) {
        if (col < problem.width) found = found || !(fabsf(widen(out1[col])) < INFINITY);
        if (kKeys && col < problem.width_v) found = found || !(fabsf(widen(out2[col])) < INFINITY);
      }
      if (lanes_max<kWarp>(found) > 0) add_up_anew<T, kD, kKeys>(backward, block, row);
    }
  }
}

template <class T, int kD, Role kRole>
__device__ void produce(const Sm90BackwardArgs& args, const BackwardMemory<T, kD, kRole>& memory) {
  using Tiles = Sm90BackwardTiles<kD, kRole>;
  constexpr int kCols = Tiles::kCols;
  constexpr bool kKeys = kOwnsKeys<kRole>;
  BackwardBarriers* bars = memory.bars;
  const Problem& problem = args.backward.problem;
  int turn = 0, done = 0;
  for (int index = blockIdx.x; index < args.tiles; index += gridDim.x) {
    const Block block = block_of(problem, index, kKeys, kTileRows);
    if (block.first >= (kKeys ? block.mask.keys : block.mask.queries)) continue;
    Walk<kCols, kRole> walk(problem, block);
    int64_t first_head = kKeys ? block.head * (problem.heads_q / problem.heads_k) : block.head_k;
    int own0 = kKeys ? block.key0 : block.query0, walked0 = kKeys ? block.query0 : block.key0;
    barrier_wait(&bars->x_empty, turn % 2 ^ 1);
    barrier_arrive_expect(&bars->x_full, 2 * Tiles::kOwned * int(sizeof(T)));
    load_boxes<T, kTileRows, kD>(memory.x1, &args.x1, &bars->x_full, own0 + block.first, block.head, block.batch);
    load_boxes<T, kTileRows, kD>(memory.x2, &args.x2, &bars->x_full, own0 + block.first, block.head, block.batch);
    for (; walk.left > 0; walk.next(), ++done) {
      int stage = done % kStages, row = walked0 + walk.column;
      T* y1 = memory.y + stage * 2 * Tiles::kWalked;
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
  const BackwardMemory<T, kD, kRole> memory(tile_memory());
  BackwardBarriers* bars = memory.bars;
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
    if (threadIdx.x == 0) produce(args, memory);
  } else {
    take_registers<kConsumerRegisters>();
    consume<T, kD, kRole>(args, threadIdx.x / kWarpgroup - 1, memory);
  }
#elif defined(__CUDA_ARCH__)
  __trap();  // launched where it was not compiled for
#endif
}

// From sums to dq, a warp a row.
template <class T> __global__ void __launch_bounds__(kBlockThreads) attention_bwd_sums_kernel(const BackwardArgs args) {
  const Problem& problem = args.problem;
  const Block block = block_of(problem, blockIdx.x, false, kTileRows);
  for (int i = threadIdx.x / kWarp; i < kTileRows && block.first + i < block.mask.queries; i += kBlockThreads / kWarp) {
    int row = block.first + i, col = threadIdx.x % kWarp * 4;  // four of at most 128
    float4 sums{};
    if (col < problem.width) {
      sums = *reinterpret_cast<const float4*>(args.dq_sums + block.query_number(problem, block.head, row) * problem.width + col);
    }
    bool finite = fabsf(sums.x) < INFINITY && fabsf(sums.y) < INFINITY && fabsf(sums.z) < INFINITY && fabsf(sums.w) < INFINITY;
    if (lanes_max<kWarp>(!finite) > 0) {
      add_up_anew<T, 128, false>(args, block, row);
    } else if (col < problem.width) {
      uint32_t* to = reinterpret_cast<uint32_t*>(row_of<T, false>(args.dq, block, row) + col);
      to[0] = pack<T>(sums.x * problem.scale, sums.y * problem.scale);
      to[1] = pack<T>(sums.z * problem.scale, sums.w * problem.scale);
    }
  }
}

// --- launch -----------------------------------------------------------------------------------------------------------
template <class T, int kD, Role kRole> void launch_role(const Target& target, const BackwardArgs& backward) {
  constexpr bool kKeys = kOwnsKeys<kRole>;
  constexpr int kCols = Sm90BackwardTiles<kD, kRole>::kCols;
  const Problem& p = backward.problem;
  Sm90BackwardArgs args{{}, {}, {}, {}, backward, int(blocks_of(p, kKeys, kTileRows))};
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
         grid_of(std::min(args.tiles, processors(target))), kBlockThreads, Sm90BackwardTiles<kD, kRole>::kSharedBytes, args);
}

}  // namespace

bool backward_sm90_takes(const Target& target, const BackwardArgs& backward) {
  const Problem& p = backward.problem;
  if (!sm90_takes(target, p, backward.aligned)) return false;
  if (std::max(blocks_of(p, false, kTileRows), blocks_of(p, true, kTileRows)) >= kFar) return false;  // counted in 32 bits
  for (const Operand* x : {&backward.q, &backward.k, &backward.v, &backward.d_o}) {  // a tensor map has no stride of 0
    bool of_queries = x == &backward.q || x == &backward.d_o;
    if ((p.batch > 1 && x->batch <= 0) || ((of_queries ? p.heads_q : p.heads_k) > 1 && x->head <= 0) ||
        ((of_queries ? p.queries : p.keys) > 1 && x->row <= 0)) {
      return false;
    }
  }
  return true;
}

bool backward_sm90(const Target& target, const BackwardArgs& backward) {
  if (!backward_sm90_takes(target, backward)) return false;
  const Problem& p = backward.problem;
  dispatch_padded<64, 128>(std::max(p.width, p.width_v), [&](auto width) {
    constexpr int kD = decltype(width)::value;
    auto run = [&](auto tag) {
      using T = typename decltype(tag)::type;
      if (backward.dq_sums != nullptr) {
        launch_role<T, kD, Role::kKeysAndSums>(target, backward);
        launch(target, "attention_backward", attention_bwd_sums_kernel<T>, grid_of(blocks_of(p, false, kTileRows)), kBlockThreads,
               0, backward);
        return;
      }
      if (backward.dq.data != nullptr) launch_role<T, kD, Role::kQueries>(target, backward);
      if (backward.dk.data != nullptr) launch_role<T, kD, Role::kKeys>(target, backward);
    };
    p.dtype == DType::kF16 ? run(TypeTag<f16>{}) : run(TypeTag<bf16>{});
  });
  return true;
}

}  // namespace fastlm::cuda::attention
