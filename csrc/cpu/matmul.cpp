#include "matmul.h"

#include "isa.h"
#include "parallel.h"
#include "workspace.h"

namespace fastlm::cpu {

void matmul(DType dtype, const Matmul& m, int threads) {
  const MatmulKernels& kernel = kernels_for(dtype).matmul;
  auto run = kernel.tile[static_cast<int>(dtype)];
  constexpr int64_t kLeastRows = 64;  // of a tile: below, packing B costs more than sharing out brings
  int64_t tile_rows = kernel.tile_rows;
  auto blocks = [](int64_t n, int64_t of) { return (n + of - 1) / of; };
  const int64_t col_blocks = blocks(m.cols, kernel.tile_cols);
  while (threads > 1 && tile_rows > kLeastRows && blocks(m.rows, tile_rows) * col_blocks < 4 * int64_t{threads}) tile_rows /= 2;
  const int64_t tasks = blocks(m.rows, tile_rows) * col_blocks;
  if (tasks == 0) return;
  Workspace work(min_threads(threads, tasks), kernel.work_bytes);
  parallel_tasks(threads, tasks, [&](int64_t task, int thread) {
    int64_t row = task / col_blocks * tile_rows, col = task % col_blocks * kernel.tile_cols;
    run(m, row, std::min(m.rows, row + tile_rows), col, std::min(m.cols, col + kernel.tile_cols), work.piece(thread));
  });
}

}  // namespace fastlm::cpu
