// Attention of few queries to a cache of keys: the keys of one head are read once for all of the queries that see them,
// by several blocks where the rest of the work would not fill the device, whose results a second kernel adds up. In a fixed
// order, so that the same call gives the same bits.
//
// On tensor cores a tile is 16 queries, of all query heads of a group, by 64 keys, of which each of four warps takes 16.
// In fp32 arithmetic, which float32 and older devices need, a block has one query and eight lanes take a key.
#include "attention_mma.cuh"

namespace fastlm::cuda::attention {
namespace {

constexpr int kTileQueries = 16;
constexpr int kTileKeys = 64;
constexpr int kKeysOfWarp = kTileKeys / (kThreads / kWarp);
constexpr int kLanesOfKey = 8;  // without tensor cores

struct DecodeArgs {
  Problem problem;
  Operand q;
  Cache cache;
  Operand o;
  float* lse;
  float* partial;  // per split and query: the sums over keys, then the maximum of the scores and the sum of the weights
  int splits;
  bool aligned;
};

// --- what a block works on --------------------------------------------------------------------------------------------
// Queries of one sequence and key head, numbered over the heads of the group, and the keys of one split.
struct Part {
  int64_t batch, head_k;
  int split, first, rows;  // queries: the tile's first, and how many there are
  Mask mask;
  int key_begin, key_end;

  __device__ Part(const DecodeArgs& args, int64_t index, int tile_rows, int tile_keys) {
    const Problem& problem = args.problem;
    rows = problem.heads_q / problem.heads_k * problem.queries;
    int tiles = (rows + tile_rows - 1) / tile_rows;
    split = int(index % args.splits);
    first = int(index / args.splits % tiles) * tile_rows;
    head_k = index / args.splits / tiles % problem.heads_k;
    batch = index / args.splits / tiles / problem.heads_k;
    int64_t length = args.cache.lens[batch];
    mask = problem.band.mask(problem.queries, int(length < 0 ? 0 : length > problem.keys ? problem.keys : length));
    int begin = mask.key_begin(0) / tile_keys * tile_keys, end = mask.key_end(0, problem.queries);
    int tiles_of_split = ((end - begin + tile_keys - 1) / tile_keys + args.splits - 1) / args.splits;
    key_begin = begin + split * tiles_of_split * tile_keys;
    key_end = key_begin + tiles_of_split * tile_keys < end ? key_begin + tiles_of_split * tile_keys : end;
  }
  __device__ int64_t head(const Problem& problem, int row) const {
    return head_k * (problem.heads_q / problem.heads_k) + row / problem.queries;
  }
  // Its place among what is kept for each query of the call.
  __device__ int64_t query_number(const Problem& problem, int row) const {
    return (batch * problem.heads_q + head(problem, row)) * problem.queries + row % problem.queries;
  }
};

// Where key j of this sequence begins. A page that does not exist is never read.
__device__ inline int64_t key_offset(const DecodeArgs& args, const Operand& x, const Part& part, int j) {
  const Cache& cache = args.cache;
  if (cache.pages == nullptr) return part.batch * x.batch + part.head_k * x.head + j * x.row;
  int64_t page = cache.pages[part.batch * cache.pages_row + j / cache.page_size];
  page = page < 0 ? 0 : page >= cache.page_count ? cache.page_count - 1 : page;
  return page * x.batch + part.head_k * x.head + j % cache.page_size * x.row;
}

// A score in units of log 2.
__device__ inline float decode_score(const Problem& problem, const Mask& mask, float product, float slope, int i, int j) {
  float s = product * problem.scale, cap = problem.terms.softcap;
  if (cap > 0) s = cap * tanhf(s / cap);
  if (problem.terms.slopes != nullptr) s -= slope * fabsf(float(j - i - (mask.keys - mask.queries)));
  return s * kLog2e;
}

__device__ inline float slope_of(const Problem& problem, const Part& part, int row) {
  const float* slopes = problem.terms.slopes;
  return slopes == nullptr ? 0.0f : slopes[part.batch * problem.heads_q + part.head(problem, row)];
}

// Parts of a softmax as they are added up, `stats(w)` {maximum, sum} of each.
struct Merged {
  float max, sum;
};
template <class Stats> __device__ Merged merge_stats(int count, const Stats& stats) {
  Merged m{-INFINITY, 0.0f};
  for (int w = 0; w < count; ++w) m.max = fmaxf(m.max, stats(w).x);
  for (int w = 0; w < count; ++w) m.sum += stats(w).y * exp2_approx(stats(w).x - finite_max(m.max));
  return m;
}

// Where a split puts what it found of a query.
__device__ inline float* partial_of(const DecodeArgs& args, int split, int64_t number) {
  const Problem& problem = args.problem;
  int64_t queries = int64_t(problem.batch) * problem.heads_q * problem.queries;
  return args.partial + (split * queries + number) * (problem.width_v + 2);
}

// --- on tensor cores --------------------------------------------------------------------------------------------------
template <int kD> constexpr int kDecodeSharedBytes = (kTileQueries + 2 * kTileKeys) * kD * 2;

template <class T, int kD> __global__ void __launch_bounds__(kThreads, 2) attention_decode_kernel(const DecodeArgs args) {
  static_assert(4 * (kThreads / kWarp) * kTileQueries * (kD + 2) <= kDecodeSharedBytes<kD>);  // for the warps' results
  const Problem& problem = args.problem;
  const Part part(args, blockIdx.x, kTileQueries, kTileKeys);
  const Mask& mask = part.mask;
  T* tile_q = reinterpret_cast<T*>(dynamic_shared());
  T* tile_k = tile_q + kTileQueries * kD;
  T* tile_v = tile_k + kTileKeys * kD;
  int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int query[2];  // of rows lane / 4 and lane / 4 + 8
  float slope[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int row = part.first + acc_row(lane, 2 * half);
    query[half] = row % problem.queries;
    slope[half] = row < part.rows ? slope_of(problem, part, row) : 0.0f;
  }
  float acc[kD / 8][4] = {};
  float max[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};

  auto load_keys = [&](T* tile, const Operand& x, int k0, int width) {
    load_rows<T, kTileKeys, kD>(tile, static_cast<const T*>(x.data), [&](int j) { return key_offset(args, x, part, j); }, k0,
                                part.key_end, width, args.aligned);
  };
  auto query_offset = [&](int row) {
    return part.batch * args.q.batch + part.head(problem, row) * args.q.head + row % problem.queries * args.q.row;
  };
  load_rows<T, kTileQueries, kD>(tile_q, static_cast<const T*>(args.q.data), query_offset, part.first, part.rows,
                                 problem.width, args.aligned);
  load_keys(tile_k, args.cache.k, part.key_begin, problem.width);
  copy_commit();
  for (int k0 = part.key_begin; k0 < part.key_end; k0 += kTileKeys) {
    load_keys(tile_v, args.cache.v, k0, problem.width_v);
    copy_commit();
    copy_wait<1>();  // for the keys
    __syncthreads();
    float s[kKeysOfWarp / 8][4];
    LaneAddress at = a_address(lane);
    product_transposed<T, kD, kKeysOfWarp>(
        s, [&](uint32_t(&a)[4], int step) { load_matrices(a, tile_q + tile_offset(at.row, 2 * step + at.chunk, kD / 8)); },
        tile_k + warp * kKeysOfWarp * kD);
    int own0 = k0 + warp * kKeysOfWarp;
    bool whole = mask.whole(0, problem.queries, k0, kTileKeys);
#pragma unroll
    for (int n = 0; n < kKeysOfWarp / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        int i = query[e / 2], j = own0 + 8 * n + acc_col(lane, e);
        s[n][e] = whole || mask.visible(i, j) ? decode_score(problem, mask, s[n][e], slope[e / 2], i, j) : -INFINITY;
      }
    }
    add_scores<kKeysOfWarp, kD>(s, max, sum, acc);

    copy_wait<0>();  // for the values
    __syncthreads();
    if (k0 + kTileKeys < part.key_end) load_keys(tile_k, args.cache.k, k0 + kTileKeys, problem.width);
    copy_commit();
    const T* own_v = tile_v + warp * kKeysOfWarp * kD;
    if (!whole && __syncthreads_or(has_nonfinite<T, kTileKeys, kD>(tile_v))) {
      product_guarded<T, kD, kKeysOfWarp, kD>(acc, s, own_v, 0, [&](int row, int col) {
        return mask.visible((part.first + row) % problem.queries, own0 + col);
      });
    } else {
      product<T, kD, kKeysOfWarp, kD>(acc, s, own_v, 0);
    }
    __syncthreads();  // before the next values overwrite these
  }
  copy_wait<0>();
  __syncthreads();

  // The warps' results, one beside the other.
  float* sums = reinterpret_cast<float*>(dynamic_shared());
  float2* stats = reinterpret_cast<float2*>(sums + kThreads / kWarp * kTileQueries * kD);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int row = warp * kTileQueries + acc_row(lane, 2 * half);
    float of_row = lanes_sum<4>(sum[half]);
    if (lane % 4 == 0) stats[row] = make_float2(max[half], of_row);
#pragma unroll
    for (int n = 0; n < kD / 8; ++n) {
      float* to = sums + row * kD + 8 * n + acc_col(lane, 0);
      to[0] = acc[n][2 * half], to[1] = acc[n][2 * half + 1];
    }
  }
  __syncthreads();
  for (int row = warp; row < kTileQueries && part.first + row < part.rows; row += kThreads / kWarp) {
    auto of_warp = [&](int w) { return stats[w * kTileQueries + row]; };
    Merged m = merge_stats(kThreads / kWarp, of_warp);
    float* to = partial_of(args, part.split, part.query_number(problem, part.first + row));
    for (int d = lane; d < problem.width_v; d += kWarp) {
      float value = 0;
#pragma unroll
      for (int w = 0; w < kThreads / kWarp; ++w) {
        value += sums[(w * kTileQueries + row) * kD + d] * exp2_approx(of_warp(w).x - finite_max(m.max));
      }
      to[d] = value;
    }
    if (lane == 0) to[problem.width_v] = m.max, to[problem.width_v + 1] = m.sum;
  }
}

// --- in fp32 arithmetic -----------------------------------------------------------------------------------------------
template <int kD> __global__ void __launch_bounds__(kThreads, 4) attention_decode_f32_kernel(const DecodeArgs args) {
  constexpr int kGroups = kThreads / kLanesOfKey, kVectors = kD / (4 * kLanesOfKey);
  const Problem& problem = args.problem;
  const Part part(args, blockIdx.x, 1, kGroups);
  const Mask& mask = part.mask;
  int lane = threadIdx.x % kLanesOfKey, group = threadIdx.x / kLanesOfKey;
  int i = part.first % problem.queries;
  float slope = slope_of(problem, part, part.first);
  // Columns 4 lane ... 4 lane + 3 of every 32.
  auto load = [&](float4(&to)[kVectors], const Operand& x, int64_t offset, int width) {
#pragma unroll
    for (int c = 0; c < kVectors; ++c) {
      int col = 4 * (lane + kLanesOfKey * c);
      to[c] = load_four(x, problem.dtype, offset + col, width - col, args.aligned);
    }
  };
  float4 q[kVectors], kv[kVectors];
  load(q, args.q, part.batch * args.q.batch + part.head(problem, part.first) * args.q.head + i * args.q.row, problem.width);
  float4 acc[kVectors];
#pragma unroll
  for (float4& a : acc) a = make_float4(0, 0, 0, 0);
  float max = -INFINITY, sum = 0;
  for (int k0 = part.key_begin; k0 < part.key_end; k0 += kGroups) {  // all lanes together, for the sum over them
    int j = k0 + group;
    bool seen = j < part.key_end && mask.visible(i, j);
    if (seen) load(kv, args.cache.k, key_offset(args, args.cache.k, part, j), problem.width);
    float product = 0;
#pragma unroll
    for (int c = 0; c < kVectors; ++c) {
      if (seen) product += q[c].x * kv[c].x + q[c].y * kv[c].y + q[c].z * kv[c].z + q[c].w * kv[c].w;
    }
    product = lanes_sum<kLanesOfKey>(product);
    if (!seen) continue;
    float s = decode_score(problem, mask, product, slope, i, j), new_max = fmaxf(max, s);
    float rescale = exp2_approx(max - finite_max(new_max)), p = exp2_approx(s - finite_max(new_max));
    max = new_max;
    sum = sum * rescale + p;
    load(kv, args.cache.v, key_offset(args, args.cache.v, part, j), problem.width_v);
#pragma unroll
    for (int c = 0; c < kVectors; ++c) {
      acc[c].x = acc[c].x * rescale + p * kv[c].x, acc[c].y = acc[c].y * rescale + p * kv[c].y;
      acc[c].z = acc[c].z * rescale + p * kv[c].z, acc[c].w = acc[c].w * rescale + p * kv[c].w;
    }
  }

  float* sums = reinterpret_cast<float*>(dynamic_shared());
  float2* stats = reinterpret_cast<float2*>(sums + kGroups * kD);
#pragma unroll
  for (int c = 0; c < kVectors; ++c) {
    *reinterpret_cast<float4*>(sums + group * kD + 4 * (lane + kLanesOfKey * c)) = acc[c];
  }
  if (lane == 0) stats[group] = make_float2(max, sum);
  __syncthreads();
  Merged m = merge_stats(kGroups, [&](int w) { return stats[w]; });
  float* to = partial_of(args, part.split, part.query_number(problem, part.first));
  for (int d = threadIdx.x; d < problem.width_v; d += kThreads) {
    float value = 0;
    for (int w = 0; w < kGroups; ++w) value += sums[w * kD + d] * exp2_approx(stats[w].x - finite_max(m.max));
    to[d] = value;
  }
  if (threadIdx.x == 0) to[problem.width_v] = m.max, to[problem.width_v + 1] = m.sum;
}

template <int kD> constexpr int kDecodeF32SharedBytes = 4 * (kThreads / kLanesOfKey) * (kD + 2);

// --- the splits together ----------------------------------------------------------------------------------------------
// A warp takes a query.
template <class T> __global__ void __launch_bounds__(kThreads) attention_decode_merge_kernel(const DecodeArgs args) {
  const Problem& problem = args.problem;
  int64_t queries = int64_t(problem.batch) * problem.heads_q * problem.queries;
  int64_t number = int64_t(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (number >= queries) return;  // the whole warp
  int64_t i = number % problem.queries, head = number / problem.queries % problem.heads_q,
          batch = number / problem.queries / problem.heads_q;
  int lane = threadIdx.x % kWarp, width = problem.width_v;
  auto stats = [&](int split) {
    const float* at = partial_of(args, split, number) + width;
    return make_float2(at[0], at[1]);
  };
  Merged m = merge_stats(args.splits, stats);
  float max = m.max;  // before the sink
  Block block{};
  block.batch = batch, block.head = head;
  float factor = add_sink(problem, block, m.max, m.sum) * final_factor(m.sum);
  T* o = static_cast<T*>(const_cast<void*>(args.o.data)) + batch * args.o.batch + head * args.o.head + i * args.o.row;
  for (int d = lane; d < width; d += kWarp) {
    float value = 0;
    for (int split = 0; split < args.splits; ++split) {
      value += partial_of(args, split, number)[d] * exp2_approx(stats(split).x - finite_max(max));
    }
    o[d] = narrow<T>(value * factor);
  }
  if (lane == 0) args.lse[number] = final_lse(m.max, m.sum);
}

// --- launch -----------------------------------------------------------------------------------------------------------
int64_t blocks_of_a_split(const Target& target, const Problem& problem) {
  int64_t rows = int64_t(problem.heads_q / problem.heads_k) * problem.queries;
  int64_t tiles = on_tensor_cores(target, problem.dtype) ? ceil_div(rows, kTileQueries) : rows;
  return int64_t(problem.batch) * problem.heads_k * tiles;
}

}  // namespace

int decode_splits(const Target& target, const Problem& problem) {
  constexpr int64_t kBlocksOfProcessor = 4, kMost = 128, kLeastKeys = 4 * kTileKeys;
  if (problem.heads_k == 0) return 1;
  int64_t blocks = std::max<int64_t>(blocks_of_a_split(target, problem), 1);
  int64_t wanted = ceil_div(kBlocksOfProcessor * processors(target), blocks), most = ceil_div(problem.keys, kLeastKeys);
  return int(std::max<int64_t>(std::min({wanted, most, kMost}), 1));
}

void decode(const Target& target, const Problem& problem, const Operand& q, const Cache& cache, const Operand& o, float* lse,
            float* partial, int splits) {
  DecodeArgs args{problem, q, cache, o, lse, partial, splits, true};
  for (const Operand* x : {&q, &cache.k}) args.aligned &= aligned(*x, problem.width, problem.dtype);
  args.aligned &= aligned(cache.v, problem.width_v, problem.dtype);
  if (int64_t(problem.batch) * problem.heads_q * problem.queries == 0) return;
  dim3 grid = grid_of(blocks_of_a_split(target, problem) * splits);
  int width = std::max(problem.width, problem.width_v);
  if (on_tensor_cores(target, problem.dtype)) {
    dispatch_half(problem.dtype, [&](auto tag) {
      dispatch_padded<64, 96, 128, 192, 256>(width, [&](auto padded) {
        constexpr int kD = decltype(padded)::value;
        launch(target, "attention_decode", attention_decode_kernel<typename decltype(tag)::type, kD>, grid, kThreads,
               kDecodeSharedBytes<kD>, args);
      });
    });
  } else {
    dispatch_padded<128, 256>(width, [&](auto padded) {
      constexpr int kD = decltype(padded)::value;
      launch(target, "attention_decode", attention_decode_f32_kernel<kD>, grid, kThreads, kDecodeF32SharedBytes<kD>, args);
    });
  }
  dispatch_float(problem.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if constexpr (!std::is_same_v<T, double>) {
      int64_t queries = int64_t(problem.batch) * problem.heads_q * problem.queries;
      launch(target, "attention_decode", attention_decode_merge_kernel<T>, grid_of(ceil_div(queries, kThreads / kWarp)),
             kThreads, 0, args);
    }
  });
}

}  // namespace fastlm::cuda::attention
