#include "attention.h"

#include <cmath>
#include <cstring>
#include <vector>

#include "isa.h"
#include "parallel.h"
#include "workspace.h"

namespace fastlm::cpu {
namespace {

// With fewer groups of heads than this, the backward splits them into tasks that sum their own gradients. The number
// depends on the shape alone, so that the result does not depend on the number of threads. The sums of dq, in float, may
// take kMaxSums times the memory of the gradients.
constexpr int64_t kEnoughTasks = 8, kMaxParts = 4, kMaxSums = 2;
constexpr int64_t kLeastKeys = 256;  // of a part

int64_t size_of_sum(DType dtype) { return dtype == DType::kF64 ? 8 : 4; }

const char* at(const void* base, int64_t offset, int64_t size) { return static_cast<const char*>(base) + offset * size; }
char* at(void* base, int64_t offset, int64_t size) { return static_cast<char*>(base) + offset * size; }

// Of query head `head` of batch row `n`.
AttentionScores scores_of(const AttentionBatch& b, int64_t n, int64_t head, int64_t sum_size) {
  AttentionScores scores = b.scores;
  if (scores.mask != nullptr) scores.mask += n * b.mask.batch + head * b.mask.head;
  if (scores.bias != nullptr) scores.bias = at(scores.bias, n * b.bias.batch + head * b.bias.head, sum_size);
  if (scores.dbias != nullptr) {
    scores.dbias = at(scores.dbias, (b.dbias_of_all ? 0 : n * b.dbias.batch) + head * b.dbias.head, sum_size);
    scores.add_dbias = b.dbias_of_all && n > 0;
  }
  scores.slope = b.slopes == nullptr ? 0 : b.slopes[n * b.q_heads + head];
  scores.sink = b.sinks == nullptr ? -INFINITY : b.sinks[n * b.q_heads + head];
  if (b.pages != nullptr) scores.pages = b.pages + n * b.pages_row;
  scores.first_element += n * b.element.batch + head * b.element.head;
  return scores;
}

// Where part `i` of `parts` starts, so that each has about as many visible (query, key) pairs, on whole tiles of keys.
int64_t part_begin(const AttentionShape& s, int64_t i, int64_t parts) {
  if (i == 0) return 0;
  if (i == parts) return s.k_len;
  auto seen = [&](int64_t key) {
    return std::max<int64_t>(0, std::min(s.q_len, key - s.lower + 1) - std::max<int64_t>(0, key - s.diagonal));
  };
  double total = 0, sum = 0;
  for (int64_t j = 0; j < s.k_len; j += kKeyTile) total += seen(j);
  int64_t j = 0;
  for (; j < s.k_len && sum < total * i / parts; j += kKeyTile) sum += seen(j);
  return std::min(j, s.k_len);
}

}  // namespace

void attention_forward(DType dtype, const AttentionBatch& b, const void* q, const void* k, const void* v, void* o,
                       void* lse, int threads) {
  const AttentionShape& s = b.shape;
  const int type = static_cast<int>(dtype);
  const AttentionKernels& kernel = kernels_for(dtype).attention;
  const int64_t size = size_of(dtype), group = b.q_heads / std::max<int64_t>(1, b.k_heads);
  const int64_t heads = b.batch * b.q_heads;
  // Smaller blocks where there would be too few to share out; a row's result does not depend on its block, as long as blocks are
  // whole panels: AVX2's have 24 queries, the others' a power of two.
  const int64_t most = std::strcmp(kernels_for(dtype).isa, "avx2") == 0 ? kQueryBlock / 48 * 48 : kQueryBlock;
  const bool few = heads * ((s.q_len + most - 1) / most) < 4 * int64_t{threads};
  const int64_t rows = few ? most / 2 : most;
  const int64_t blocks = (s.q_len + rows - 1) / rows, tasks = heads * blocks;
  if (tasks == 0) return;
  Workspace work(min_threads(threads, tasks), kernel.forward_bytes[type](s));
  parallel_tasks(threads, tasks, [&](int64_t task, int thread) {
    // Heads one after the other, since their queries share keys; within a head the longest block first.
    int64_t block = blocks - 1 - task % blocks, head = task / blocks % b.q_heads, n = task / blocks / b.q_heads;
    int64_t k_head = head / group, begin = block * rows;
    AttentionShape of_row = s;
    if (b.k_lens != nullptr) {
      const int64_t shift = b.k_lens[n] - s.k_len;
      of_row.k_len += shift, of_row.lower += shift, of_row.diagonal += shift;
    }
    kernel.forward[type](of_row, scores_of(b, n, head, size_of_sum(dtype)), at(q, n * b.q.batch + head * b.q.head, size),
                         at(k, n * b.k.batch + k_head * b.k.head, size),
                         at(v, n * b.v.batch + k_head * b.v.head, size), at(o, n * b.o.batch + head * b.o.head, size),
                         at(lse, n * b.lse.batch + head * b.lse.head, size_of_sum(dtype)), begin,
                         std::min(s.q_len, begin + rows), work.piece(thread));
  });
}

void attention_backward(DType dtype, const AttentionBatch& b, const void* dout, const void* dlse, const void* q,
                        const void* k, const void* v, const void* o, const void* lse, void* dq, void* dk, void* dv,
                        int threads) {
  const AttentionShape& s = b.shape;
  const int type = static_cast<int>(dtype);
  const AttentionKernels& kernel = kernels_for(dtype).attention;
  const int64_t size = size_of(dtype), sum_size = size_of_sum(dtype);
  const int64_t groups = b.batch * b.k_heads;
  if (groups == 0) return;
  // One task goes through the batch, head after head, where all of it adds to one gradient.
  const int64_t in_turn = b.dbias_of_all ? b.batch : 1, turns = groups / in_turn;
  const int64_t heads = b.q_heads / b.k_heads;
  // Too few tasks: the query heads of a key head are taken in chunks, which sum their own dk and dv; then the keys in parts.
  auto missing = [](int64_t tasks) { return (kEnoughTasks + tasks - 1) / tasks; };
  const int64_t chunks = std::max<int64_t>(1, std::min(heads, missing(turns)));
  const int64_t gradients = size * (heads * s.q_len * s.dim + s.k_len * (s.dim + s.v_dim));
  const int64_t affordable = kMaxSums * gradients / std::max<int64_t>(1, sum_size * heads * s.q_len * s.dim);
  const int64_t wanted = std::min({missing(turns * chunks), kMaxParts, affordable});
  const int64_t parts = std::max<int64_t>(1, std::min(wanted, s.k_len / kLeastKeys));
  const int64_t tasks = turns * chunks * parts, team = min_threads(threads, tasks);
  const int64_t most_heads = std::max<int64_t>(1, (heads + chunks - 1) / chunks);
  auto dq_sums_bytes = [&](int64_t heads) { return kernel.dq_sums_count[type](s, heads) * sum_size; };
  const int64_t dk_count = kernel.dk_sums_count[type](s), dv_count = kernel.dv_sums_count[type](s);

  std::vector<double> dslopes(b.dslopes == nullptr ? 0 : b.batch * b.q_heads * parts);
  auto group_of = [&](int64_t index, int64_t chunk) {
    int64_t n = index / b.k_heads, k_head = index % b.k_heads, head = k_head * heads + heads * chunk / chunks;
    AttentionGroup g{};
    g.heads = heads * (chunk + 1) / chunks - heads * chunk / chunks;
    g.q = at(q, n * b.q.batch + head * b.q.head, size);
    g.k = at(k, n * b.k.batch + k_head * b.k.head, size);
    g.v = at(v, n * b.v.batch + k_head * b.v.head, size);
    g.o = at(o, n * b.o.batch + head * b.o.head, size);
    g.dout = at(dout, n * b.dout.batch + head * b.dout.head, size);
    g.lse = at(lse, n * b.lse.batch + head * b.lse.head, sum_size);
    g.dlse = dlse == nullptr ? nullptr : at(dlse, n * b.lse.batch + head * b.lse.head, sum_size);
    g.dq = at(dq, n * b.dq.batch + head * b.dq.head, size);
    g.dk = at(dk, n * b.dk.batch + k_head * b.dk.head, size);
    g.dv = at(dv, n * b.dv.batch + k_head * b.dv.head, size);
    g.q_head = b.q.head, g.o_head = b.o.head, g.do_head = b.dout.head, g.dq_head = b.dq.head, g.lse_head = b.lse.head;
    g.scores = scores_of(b, n, head, sum_size);
    g.mask_head = b.mask.head, g.bias_head = b.bias.head, g.dbias_head = b.dbias.head, g.element_head = b.element.head;
    g.slopes = b.slopes == nullptr ? nullptr : b.slopes + n * b.q_heads + head;
    g.dslopes = dslopes.empty() ? nullptr : dslopes.data() + (n * b.q_heads + head) * parts, g.dslope_head = parts;
    return g;
  };

  Workspace work(team, kernel.backward_bytes[type](s, most_heads));
  // One part: a thread's sums are finished before it takes the next group. More: all are kept until the end.
  Workspace sums(parts == 1 ? team : groups * chunks, parts * dq_sums_bytes(most_heads));
  // Not bought from kMaxSums: of few key heads, but for the whole batch where it shares one bias's gradient.
  Workspace dk_sums(chunks == 1 ? 0 : groups, chunks * dk_count * sum_size);
  Workspace dv_sums(chunks == 1 ? 0 : groups, chunks * dv_count * sum_size);
  parallel_tasks(threads, tasks, [&](int64_t task, int thread) {
    const int64_t part = task % parts, chunk = task / parts % chunks;
    for (int64_t index = task / parts / chunks; index < groups; index += turns) {
      AttentionGroup g = group_of(index, chunk);
      if (chunks > 1) {
        g.dk_sums = at(dk_sums.piece(index), chunk * dk_count, sum_size);
        g.dv_sums = at(dv_sums.piece(index), chunk * dv_count, sum_size);
      }
      void* dq_sums = at(sums.piece(parts == 1 ? thread : index * chunks + chunk), part, dq_sums_bytes(g.heads));
      if (g.dslopes != nullptr) g.dslopes += part;
      kernel.backward[type](s, g, part_begin(s, part, parts), part_begin(s, part + 1, parts), dq_sums,
                            work.piece(thread));
      if (parts == 1) kernel.finish_dq[type](s, g, dq_sums, 1);
    }
  });
  if (parts > 1) {
    parallel_tasks(threads, groups * chunks, [&](int64_t i, int) {
      kernel.finish_dq[type](s, group_of(i / chunks, i % chunks), sums.piece(i), parts);
    });
  }
  if (chunks > 1) {
    parallel_tasks(threads, groups, [&](int64_t index, int) {
      kernel.finish_dk[type](s, group_of(index, 0), dk_sums.piece(index), dv_sums.piece(index), chunks);
    });
  }
  for (size_t i = 0; i < dslopes.size(); ++i) b.dslopes[i / parts] += dslopes[i];
}

}  // namespace fastlm::cpu
