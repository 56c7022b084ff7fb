// The forward of attention on Hopper, in fp16 and bf16, in the manner of FlashAttention-3 (Shah et al. 2024,
// https://arxiv.org/abs/2407.08608). One warpgroup has the copy engine fetch tiles ahead; two others, of 64 queries each,
// take turns: while one uses the tensor cores the other computes exponentials. Within each, the scores of the next tile
// and the values of this one are under way together. Blocks stay and take one tile of queries after another.
//
// Head dims are padded with zeros to 64 or 128. Scores are scaled products alone (no ScoreTerms), scale is positive.
#include "attention_sm90.cuh"

namespace fastlm::cuda::attention {
namespace {

constexpr int kTileKeys = 128;
constexpr int kTurn = 1;  // number of the barrier that gives the first consumer its turn on the tensor cores

struct Sm90Args {
  TensorMap q, k, v;
  ForwardArgs forward;
  int64_t tiles;
};

struct Barriers {
  TileBarrier q_full, q_empty, k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
};

template <int kD> struct Sm90Tiles {
  static constexpr int kQuery = kTileRows * kD, kKey = kTileKeys * kD;  // elements
  static constexpr int kSharedBytes = 2 * (kQuery + 2 * kStages * kKey) + int(sizeof(Barriers));
};

// --- consumers --------------------------------------------------------------------------------------------------------
// Where a key is not seen, a product with its weight of 0 makes NaN of an inf or a NaN in its values. So where a row has
// come out as no number, it is added up anew, term by term and without those keys: slow and rare, and free for all others.
template <class T, int kD>
__device__ void add_up_anew(const ForwardArgs& args, const Block& block, int i, float least, float factor, T* tile, int tile_row) {
  const Problem& problem = args.problem;
  const Mask& mask = block.mask;
  int lane = threadIdx.x % kWarp;
  auto row_of = [&](const Operand& x, int64_t offset, int row) { return static_cast<const T*>(x.data) + offset + row * x.row; };
  auto at = [&](const T* row, int col, int width) { return col < width ? widen(row[col]) : 0.0f; };
  const T* q = row_of(args.q, block.at_query(args.q, block.head), i);
  float sums[kD / kWarp] = {};
  int first = i + mask.lower > 0 ? i + mask.lower : 0, last = i + mask.upper < mask.keys ? i + mask.upper : mask.keys - 1;
  for (int j = first; j <= last; ++j) {
    const T* k = row_of(args.k, block.at_key(args.k, block.head_k), j);
    const T* v = row_of(args.v, block.at_key(args.v, block.head_k), j);
    float product = 0;
#pragma unroll
    for (int c = 0; c < kD / kWarp; ++c) {
      int col = lane + kWarp * c;
      product += at(q, col, problem.width) * at(k, col, problem.width);
    }
    float weight = exp2_approx(lanes_sum<kWarp>(product) * problem.scale * kLog2e - least);
#pragma unroll
    for (int c = 0; c < kD / kWarp; ++c) sums[c] += weight * at(v, lane + kWarp * c, problem.width_v);
  }
#pragma unroll
  for (int c = 0; c < kD / kWarp; ++c) {
    int col = lane + kWarp * c;
    tile[box_offset(tile_row, col / 8, kTileRows) + col % 8] = narrow<T>(sums[c] * factor);
  }
}

template <class T, int kD> __device__ void consume(const Sm90Args& args, int group, T* tile_q, T* tile_k, T* tile_v, Barriers* bars) {
  using Tiles = Sm90Tiles<kD>;
  const ForwardArgs& forward = args.forward;
  const Problem& problem = forward.problem;
  int lane = threadIdx.x % kWarp, warp_row = 64 * group + threadIdx.x % kWarpgroup / kWarp * 16;  // of the warp in the tile
  float scale = problem.scale * kLog2e;
  if (group == 1) group_arrive(kTurn, kConsumers * kWarpgroup);  // consumer 0 goes first
  int turn = 0, step = 0;  // tiles of queries and of keys so far
  auto done_with = [&](TileBarrier* empty) {
    if (lane == 0) barrier_arrive(empty);
  };

  for (int64_t index = blockIdx.x; index < args.tiles; index += gridDim.x) {
    const Block block = block_of(problem, index, false, kTileRows);
    const Mask& mask = block.mask;
    int q0 = block.first, row0 = q0 + warp_row;
    if (q0 >= mask.queries) continue;
    int begin = mask.key_begin(q0) / kTileKeys * kTileKeys, end = mask.key_end(q0, kTileRows);
    float acc[kD / 8][4] = {}, s[kTileKeys / 8][4];
    uint32_t p[kTileKeys / 16][4];
    float max[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};  // of rows lane / 4 and lane / 4 + 8, before scaling; sum: this lane's columns
    // Weights of the tile at k0 from its scores; by how much sums of former tiles shrink.
    auto softmax = [&](int k0, float (&factor)[2]) {
      bool whole = mask.whole(q0, kTileRows, k0, kTileKeys);
      if (!whole) {  // by itself, or every element would have a branch
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          Mask::Span seen = mask.keys_of(row0 + acc_row(lane, 2 * half));
          int begin = seen.begin - k0 - acc_col(lane, 0), end = seen.end - k0 - acc_col(lane, 0);
#pragma unroll
          for (int i = 0; i < kTileKeys / 4; ++i) {
            float& score = s[i / 2][2 * half + i % 2];
            int col = i / 2 * 8 + i % 2;
            score = col < begin || col >= end ? -INFINITY : score;
          }
        }
      }
      float new_max[2] = {max[0], max[1]};
#pragma unroll
      for (int n = 0; n < kTileKeys / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) new_max[e / 2] = fmaxf(new_max[e / 2], s[n][e]);
      }
      float least[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        new_max[half] = lanes_max<4>(new_max[half]);
        least[half] = finite_max(new_max[half]) * scale;
        factor[half] = exp2_approx(max[half] * scale - least[half]);
        max[half] = new_max[half];
        sum[half] *= factor[half];
      }
#pragma unroll
      for (int n = 0; n < kTileKeys / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          s[n][e] = exp2_approx(s[n][e] * scale - least[e / 2]);
          sum[e / 2] += s[n][e];
        }
      }
    };
    auto keep_weights = [&] {
#pragma unroll
      for (int j = 0; j < kTileKeys / 16; ++j) as_operand<T>(p[j], s[2 * j], s[2 * j + 1]);
    };
    auto start_scores = [&](int at) {
      barrier_wait(&bars->k_full[at % kStages], at / kStages % 2);
      wgmma_fence();
      start_transposed<T, kD, kTileKeys>(s, tile_q + 64 * group * 64, tile_k + at % kStages * Tiles::kKey);
      wgmma_commit();
    };
    auto add_values = [&](int at) {
      barrier_wait(&bars->v_full[at % kStages], at / kStages % 2);
      wgmma_fence();
      start_product<T, kD, kTileKeys>(acc, p, tile_v + at % kStages * Tiles::kKey);
      wgmma_commit();
    };

    barrier_wait(&bars->q_full, turn % 2);
    if (begin < end) {
      float factor[2];
      start_scores(step);
      wgmma_wait<0>();
      pin(s);
      done_with(&bars->k_empty[step % kStages]);
      softmax(begin, factor);
      keep_weights();
      for (int k0 = begin + kTileKeys; k0 < end; k0 += kTileKeys, ++step) {
        int next = step + 1;
        group_sync(kTurn + group, kConsumers * kWarpgroup);
        start_scores(next);
        add_values(step);
        group_arrive(kTurn + (group + 1) % kConsumers, kConsumers * kWarpgroup);
        wgmma_wait<1>();
        pin(s);
        done_with(&bars->k_empty[next % kStages]);
        softmax(k0, factor);
        pin(s);  // its exponentials belong before the wait
        wgmma_wait<0>();
        pin(acc);
        done_with(&bars->v_empty[step % kStages]);
#pragma unroll
        for (int n = 0; n < kD / 8; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) acc[n][e] *= factor[e / 2];
        }
        keep_weights();
      }
      add_values(step);
      wgmma_wait<0>();
      pin(acc);
      done_with(&bars->v_empty[step % kStages]);
      ++step;
    }

    // The rows leave through this warp's part of the query tile, which other warps may still read, in 16-byte pieces.
    group_sync(kTurn + kConsumers + group, kWarpgroup);
    float factor[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      sum[half] = lanes_sum<4>(sum[half]);
      int row = row0 + acc_row(lane, 2 * half);
      if (lane % 4 == 0 && row < mask.queries) {
        float lse = sum[half] == 0.0f ? -INFINITY : (finite_max(max[half]) * scale + log2f(sum[half])) * kLn2;
        forward.lse[block.query_number(problem, block.head, row)] = lse;
      }
      factor[half] = final_factor(sum[half]);
    }
    put_rows<T, kD>(tile_q, warp_row, acc, factor[0], factor[1]);
    sync_warp();
    if (warp_has_nonfinite(acc)) {
      for (int row = 0; row < 16 && row0 + row < mask.queries; ++row) {
        int source = row % 8 * 4;  // a lane that knows of it
        float least = finite_max(shuffle(row < 8 ? max[0] : max[1], source)) * scale;
        float by = shuffle(row < 8 ? factor[0] : factor[1], source);
        add_up_anew<T, kD>(forward, block, row0 + row, least, by, tile_q, warp_row + row);
      }
      sync_warp();
    }
    T* o = static_cast<T*>(const_cast<void*>(forward.o.data)) + block.at_query(forward.o, block.head);
    store_tile_rows<T, kD>(tile_q, warp_row, o, forward.o.row, row0, mask.queries, problem.width_v);
    fence_async();
    sync_warp();
    done_with(&bars->q_empty);
    ++turn;
  }
}

// --- the producer -----------------------------------------------------------------------------------------------------
template <class T, int kD> __device__ void produce(const Sm90Args& args, T* tile_q, T* tile_k, T* tile_v, Barriers* bars) {
  using Tiles = Sm90Tiles<kD>;
  const Problem& problem = args.forward.problem;
  int turn = 0, step = 0;
  for (int64_t index = blockIdx.x; index < args.tiles; index += gridDim.x) {
    const Block block = block_of(problem, index, false, kTileRows);
    const Mask& mask = block.mask;
    if (block.first >= mask.queries) continue;
    barrier_wait(&bars->q_empty, turn % 2 ^ 1);
    barrier_arrive_expect(&bars->q_full, Tiles::kQuery * int(sizeof(T)));
    load_boxes<T, kTileRows, kD>(tile_q, &args.q, &bars->q_full, block.query0 + block.first, block.head, block.batch);
    int begin = mask.key_begin(block.first) / kTileKeys * kTileKeys, end = mask.key_end(block.first, kTileRows);
    for (int k0 = begin; k0 < end; k0 += kTileKeys, ++step) {
      int stage = step % kStages, before = step / kStages % 2 ^ 1;
      barrier_wait(&bars->k_empty[stage], before);
      barrier_arrive_expect(&bars->k_full[stage], Tiles::kKey * int(sizeof(T)));
      load_boxes<T, kTileKeys, kD>(tile_k + stage * Tiles::kKey, &args.k, &bars->k_full[stage], block.key0 + k0, block.head_k,
                                   block.batch);
      barrier_wait(&bars->v_empty[stage], before);
      barrier_arrive_expect(&bars->v_full[stage], Tiles::kKey * int(sizeof(T)));
      load_boxes<T, kTileKeys, kD>(tile_v + stage * Tiles::kKey, &args.v, &bars->v_full[stage], block.key0 + k0, block.head_k,
                                   block.batch);
    }
    ++turn;
  }
}

template <class T, int kD>
__global__ void __launch_bounds__(kBlockThreads, 1) attention_fwd_sm90_kernel(const __grid_constant__ Sm90Args args) {
#ifdef FASTLM_SM90A
  using Tiles = Sm90Tiles<kD>;
  T* tile_q = reinterpret_cast<T*>(tile_memory());
  T* tile_k = tile_q + Tiles::kQuery;
  T* tile_v = tile_k + kStages * Tiles::kKey;
  Barriers* bars = reinterpret_cast<Barriers*>(tile_v + kStages * Tiles::kKey);
  if (threadIdx.x == 0) {
    barrier_init(&bars->q_full, 1);
    barrier_init(&bars->q_empty, kConsumerWarps);
    for (int stage = 0; stage < kStages; ++stage) {
      barrier_init(&bars->k_full[stage], 1);
      barrier_init(&bars->v_full[stage], 1);
      barrier_init(&bars->k_empty[stage], kConsumerWarps);
      barrier_init(&bars->v_empty[stage], kConsumerWarps);
    }
    barrier_init_done();
  }
  __syncthreads();
  if (threadIdx.x < kWarpgroup) {
    give_registers<kProducerRegisters>();
    if (threadIdx.x == 0) produce<T, kD>(args, tile_q, tile_k, tile_v, bars);
  } else {
    take_registers<kConsumerRegisters>();
    consume<T, kD>(args, threadIdx.x / kWarpgroup - 1, tile_q, tile_k, tile_v, bars);
  }
#elif defined(__CUDA_ARCH__)
  __trap();  // launched where it was not compiled for
#endif
}

// --- launch -----------------------------------------------------------------------------------------------------------
template <class T, int kD> void launch_forward(const Target& target, const Sm90Args& args) {
  launch(target, "attention", attention_fwd_sm90_kernel<T, kD>,
         grid_of(std::min<int64_t>(args.tiles, processors(target))), kBlockThreads, Sm90Tiles<kD>::kSharedBytes, args);
}

}  // namespace

bool sm90_chosen(const Target& target) {
  const char* set = std::getenv("FASTLM_CUDA_FAMILY");
  const std::string family = set == nullptr || *set == 0 ? "sm80" : set;
  if (family != "sm80" && family != "sm90") {
    throw std::invalid_argument("fastlm: FASTLM_CUDA_FAMILY must be sm80 or sm90, got " + family);
  }
#ifdef FASTLM_HAS_SM90A  // machine code for sm_90 alone says 90 too
  return family == "sm90" && compiled_capability(target, attention_fwd_sm90_kernel<f16, 64>) == 90;
#else
  return false;
#endif
}

bool forward_sm90(const Target& target, const ForwardArgs& forward) {
  const Problem& p = forward.problem;
  if (!sm90_takes(target, p, forward.aligned)) return false;
  Sm90Args args{{}, {}, {}, forward, blocks_of(p, false, kTileRows)};
  if (!make_map(&args.q, forward.q, p.dtype, p.batch, p.heads_q, p.queries, p.width, kTileRows) ||
      !make_map(&args.k, forward.k, p.dtype, p.batch, p.heads_k, p.keys, p.width, kTileKeys) ||
      !make_map(&args.v, forward.v, p.dtype, p.batch, p.heads_k, p.keys, p.width_v, kTileKeys)) {
    return false;
  }
  dispatch_padded<64, 128>(std::max(p.width, p.width_v), [&](auto width) {
    constexpr int kD = decltype(width)::value;
    p.dtype == DType::kF16 ? launch_forward<f16, kD>(target, args) : launch_forward<bf16, kD>(target, args);
  });
  return true;
}

}  // namespace fastlm::cuda::attention
