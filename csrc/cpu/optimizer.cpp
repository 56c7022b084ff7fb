#include "optimizer.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "isa.h"
#include "parallel.h"

namespace fastlm::cpu {
namespace {

// Below this many elements a thread costs more to wake than it saves: some 10 us against 5 us of work.
constexpr int64_t kGrain = 1 << 14;
// Elements of a strided tensor that are gathered, stepped and put back at a time: seven buffers stay in the first-level
// cache.
constexpr int64_t kChunk = 512;

AverageScalars average_of(double keep) { return keep > 0.5 ? AverageScalars{1 - keep, true} : AverageScalars{-keep, false}; }

// For the parameter of that place in the list.
StepScalars scalars_at(double step, size_t place, const StepOptions& o) {
  uint32_t noise = adam_noise(step, static_cast<uint32_t>(place), o.seed);
  StepScalars s{};
  s.sign = o.maximize ? -o.scale : o.scale;
  s.l2 = o.decoupled ? 0 : o.weight_decay;
  s.l1 = o.l1;
  s.has_l2 = s.l2 != 0;
  s.has_l1 = s.l1 != 0;
  s.decay = o.decoupled ? 1 - o.lr * o.weight_decay : 1;
  s.step_size = o.lr;
  if (o.rule == StepRule::kAdam) {
    s.step_size /= 1 - std::pow(o.beta1, step);
    s.correction = 1 / std::sqrt(1 - std::pow(o.beta2, step));
  }
  s.mean = average_of(o.beta1);
  s.ema = average_of(o.ema_decay);
  s.beta2 = o.beta2;
  s.eps = o.eps;
  s.momentum = o.momentum;
  s.rest = 1 - o.dampening;
  s.starts = step == 1;
  s.nesterov = o.nesterov;
  s.stochastic = o.stochastic;
  s.stochastic_params = o.stochastic_params;
  s.noise = noise;
  s.noise_of_param = adam_noise_of_param(noise);
  return s;
}

// copy(offset, stride, i, count) for each run along the last dimension within [begin, begin + n) of the row-major order;
// i counts from 0.
template <class Copy>
void for_each_run(const StepItem& item, const int64_t* strides, int64_t begin, int64_t n, const Copy& copy) {
  int last = item.ndim - 1;
  for (int64_t i = 0; i < n;) {
    int64_t rest = begin + i, offset = 0, column = last >= 0 ? rest % item.shape[last] : 0;
    for (int d = last; d >= 0; --d) {
      offset += rest % item.shape[d] * strides[d];
      rest /= item.shape[d];
    }
    int64_t count = last >= 0 ? std::min(n - i, item.shape[last] - column) : 1;
    copy(offset, last >= 0 ? strides[last] : 0, i, count);
    i += count;
  }
}

template <class Word> void gather_of(const StepItem& item, int tensor, int64_t begin, int64_t n, void* buffer) {
  auto from = static_cast<const Word*>(item.data[tensor]);
  auto to = static_cast<Word*>(buffer);
  for_each_run(item, item.strides[tensor], begin, n, [&](int64_t offset, int64_t stride, int64_t i, int64_t count) {
    for (int64_t k = 0; k < count; ++k) to[i + k] = from[offset + k * stride];
  });
}
template <class Word> void scatter_of(const StepItem& item, int tensor, int64_t begin, int64_t n, const void* buffer) {
  auto from = static_cast<const Word*>(buffer);
  auto to = static_cast<Word*>(item.data[tensor]);
  for_each_run(item, item.strides[tensor], begin, n, [&](int64_t offset, int64_t stride, int64_t i, int64_t count) {
    for (int64_t k = 0; k < count; ++k) to[offset + k * stride] = from[i + k];
  });
}
void gather(const StepItem& item, int tensor, int64_t begin, int64_t n, void* buffer) {
  int64_t size = size_of(item.dtype_of(tensor));
  (size == 8 ? gather_of<uint64_t> : size == 4 ? gather_of<uint32_t> : gather_of<uint16_t>)(item, tensor, begin, n, buffer);
}
void scatter(const StepItem& item, int tensor, int64_t begin, int64_t n, const void* buffer) {
  int64_t size = size_of(item.dtype_of(tensor));
  (size == 8 ? scatter_of<uint64_t> : size == 4 ? scatter_of<uint32_t> : scatter_of<uint16_t>)(item, tensor, begin, n, buffer);
}

void step_range(const StepItem& item, int64_t begin, int64_t end, StepRule rule, const StepScalars& scalars) {
  auto of_rule = kernels_for(item.dtype).optimizer.step[static_cast<int>(rule)];
  auto kernel = of_rule[static_cast<int>(item.dtype)][static_cast<int>(item.state_dtype)];
  StepArrays at{};
  if (item.flat) {
    for (int t = 0; t < kStepTensors; ++t) {
      if (item.data[t] != nullptr) at.data[t] = static_cast<char*>(item.data[t]) + begin * size_of(item.dtype_of(t));
    }
    for (int s : {0, 1}) {
      if (item.scales[s] != nullptr) at.scales[s] = item.scales[s] + begin / kStateBlock;
    }
    kernel(at, begin, end - begin, scalars);
    return;
  }
  alignas(64) uint64_t buffers[kStepTensors][kChunk];
  for (int t = 0; t < kStepTensors; ++t) at.data[t] = item.data[t] != nullptr ? buffers[t] : nullptr;
  for (; begin < end; begin += kChunk) {
    int64_t n = std::min(kChunk, end - begin);
    for (int t = 0; t < kStepTensors; ++t) {
      if (item.data[t] != nullptr) gather(item, t, begin, n, buffers[t]);
    }
    kernel(at, begin, n, scalars);
    for (int t = 0; t < kStepTensors; ++t) {
      if (item.data[t] != nullptr && t != kGrad) scatter(item, t, begin, n, buffers[t]);
    }
  }
}

}  // namespace

void optimizer_step(const std::vector<StepItem>& items, const StepOptions& options, int threads) {
  kernels();  // may throw, which it must not do in a parallel region
  std::vector<int64_t> starts;  // of each item in the row of all elements
  std::vector<StepScalars> scalars;
  int64_t total = 0;
  for (const StepItem& item : items) {
    starts.push_back(total);
    scalars.push_back(scalars_at(item.step, scalars.size(), options));
    total += item.n;
  }
  parallel_for(threads, total, kGrain, [&](int64_t begin, int64_t end) {
    // The last item that starts at or before `begin`: empty ones before it start there too.
    size_t i = std::upper_bound(starts.begin(), starts.end(), begin) - starts.begin() - 1;
    for (; i < items.size() && starts[i] < end; ++i) {
      const StepItem& item = items[i];
      int64_t from = std::max<int64_t>(begin - starts[i], 0), to = end - starts[i];
      if (item.state_dtype == DType::kU8) {  // whole blocks
        from = (from + kStateBlock - 1) / kStateBlock * kStateBlock;
        to = (to + kStateBlock - 1) / kStateBlock * kStateBlock;
      }
      to = std::min(to, item.n);
      if (from < to) step_range(item, from, to, options.rule, scalars[i]);
    }
  });
}

double sum_of_squares(const std::vector<DenseArray>& arrays, int threads) {
  constexpr int64_t kPiece = 1 << 16;  // the unit that is shared out, whatever the number of threads
  kernels();
  std::vector<std::pair<size_t, int64_t>> pieces;  // array, first element
  for (size_t i = 0; i < arrays.size(); ++i) {
    for (int64_t begin = 0; begin < arrays[i].n; begin += kPiece) pieces.push_back({i, begin});
  }
  std::vector<double> sums(pieces.size());
  parallel_for(threads, static_cast<int64_t>(pieces.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const DenseArray& array = arrays[pieces[k].first];
      int64_t from = pieces[k].second, n = std::min(kPiece, array.n - from);
      const char* data = static_cast<const char*>(array.data) + from * size_of(array.dtype);
      sums[k] = kernels_for(array.dtype).optimizer.sum_of_squares[static_cast<int>(array.dtype)](data, n);
    }
  });
  double total = 0;
  for (double sum : sums) total += sum;
  return total;
}

}  // namespace fastlm::cpu
