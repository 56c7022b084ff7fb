// The forward of attention on tensor cores: see attention_mma.cuh.
#include "attention_mma.cuh"

namespace fastlm::cuda::attention {
namespace {

template <int kD> struct ForwardTiles {
  static constexpr int kCols = kD <= 128 ? 64 : 32;
  static constexpr int kSharedBytes = (kRows + 2 * kCols) * kD * 2;
};

// The key tile is refilled while P V is computed, the value tile while Q K^T is.
template <class T, int kD, bool kTerms>
__global__ void __launch_bounds__(kThreads, 2) attention_fwd_kernel(const ForwardArgs args) {
  constexpr int kCols = ForwardTiles<kD>::kCols;
  const Problem& problem = args.problem;
  const Block block = block_of(problem, blockIdx.x, false, kRows);
  const Mask& mask = block.mask;
  int q0 = block.first;
  if (q0 >= mask.queries) return;
  const Scores<kTerms> scores(problem, block, block.head);

  T* tile_q = reinterpret_cast<T*>(dynamic_shared());
  T* tile_k = tile_q + kRows * kD;
  T* tile_v = tile_k + kCols * kD;
  const T* q = static_cast<const T*>(args.q.data) + block.at_query(args.q, block.head);
  const T* k = static_cast<const T*>(args.k.data) + block.at_key(args.k, block.head_k);
  const T* v = static_cast<const T*>(args.v.data) + block.at_key(args.v, block.head_k);

  int lane = threadIdx.x % kWarp, row0 = q0 + threadIdx.x / kWarp * kWarpRows;  // of the warp
  float acc[kD / 8][4] = {};
  float max[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};  // of rows lane / 4 and lane / 4 + 8; sum: this lane's columns
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

    bool whole = scores.whole(q0, kRows, k0, kCols);
#pragma unroll
    for (int n = 0; n < kCols / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        int i = row0 + acc_row(lane, e), j = k0 + 8 * n + acc_col(lane, e);
        s[n][e] = whole || scores.visible(i, j) ? scores.score(s[n][e], i, j) : -INFINITY;
      }
    }
    add_scores<kCols, kD>(s, max, sum, acc);
    if constexpr (kTerms) {
#pragma unroll
      for (int n = 0; n < kCols / 8; ++n) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          KeptPair keeps = scores.keeps_pair(row0 + acc_row(lane, 2 * half), k0 + 8 * n + acc_col(lane, 0));
          if (!keeps.first) s[n][2 * half] = 0.0f;
          if (!keeps.second) s[n][2 * half + 1] = 0.0f;
        }
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
                                        [&](int row, int col) { return scores.visible(row0 + row, k0 + col); });
    } else {
      product<T, kD, kCols, kD>(acc, s, tile_v, 0);
    }
    __syncthreads();  // before the next values overwrite these
  }
  copy_wait<0>();
  __syncthreads();

  float factor[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    sum[half] = lanes_sum<4>(sum[half]);
    factor[half] = 1.0f;
    if constexpr (kTerms) factor[half] = add_sink(problem, block, max[half], sum[half]) * scores.keep_scale();
    factor[half] *= final_factor(sum[half]);
    int row = row0 + acc_row(lane, 2 * half);
    if (lane % 4 == 0 && row < mask.queries) {
      args.lse[block.query_number(problem, block.head, row)] = final_lse(max[half], sum[half]);
    }
  }
  T* o = static_cast<T*>(const_cast<void*>(args.o.data)) + block.at_query(args.o, block.head);
  store_rows<T, kD, kD>(tile_q, acc, factor[0], factor[1], o, args.o.row, q0, mask.queries, problem.width_v, args.aligned);
}

}  // namespace

bool mma_runs(const Target& target) { return compiled_capability(target, attention_fwd_kernel<f16, 64, false>) >= 80; }

void forward_mma(const Target& target, const ForwardArgs& args) {
  dispatch_mma(args.problem, [&](auto tag, auto width, auto terms) {
    constexpr int kD = decltype(width)::value;
    launch(target, "attention", attention_fwd_kernel<typename decltype(tag)::type, kD, decltype(terms)::value>,
           grid_of(blocks_of(args.problem, false, kRows)), kThreads, ForwardTiles<kD>::kSharedBytes, args);
  });
}

}  // namespace fastlm::cuda::attention
