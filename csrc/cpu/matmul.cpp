#include "matmul.h"

#include "isa.h"
#include "parallel.h"
#include "workspace.h"

namespace fastlm::cpu {

namespace {

int64_t blocks(int64_t n, int64_t of) { return (n + of - 1) / of; }
// Whole blocks of at most `tile`, of about one size.
int64_t even(int64_t n, int64_t tile, int64_t multiple) {
  const int64_t each = blocks(n, blocks(n, tile));
  return std::min(tile, blocks(each, multiple) * multiple);
}

}  // namespace

void matmul(DType dtype, const Matmul& m, int threads) {
  if (m.rows == 0 || m.cols == 0) return;
  const MatmulKernels& kernel = kernels_for(dtype).matmul;
  auto run = kernel.tile[static_cast<int>(dtype)];
  // Below the least, packing one factor costs more than sharing out brings. Columns in whole panels of any instruction set.
  constexpr int64_t kLeastRows = 64, kLeastCols = 96, kPanels = 96;
  int64_t rows = kernel.tile_rows, cols = kernel.tile_cols;
  auto shared_out = [&] {  // many tasks, or as many for each thread
    const int64_t tasks = blocks(m.rows, rows) * blocks(m.cols, cols);
    return tasks >= 8 * int64_t{threads} || (tasks >= 2 * int64_t{threads} && tasks % threads == 0);
  };
  while (threads > 1 && !shared_out()) {
    if (cols > kLeastCols && std::min(m.cols, cols) > std::min(m.rows, rows)) {
      cols = std::max(kLeastCols, cols / 2 / kPanels * kPanels);
    } else if (rows > kLeastRows) {
      rows /= 2;
    } else {
      break;
    }
  }
  rows = even(m.rows, rows, 16), cols = even(m.cols, cols, kPanels);
  const int64_t col_blocks = blocks(m.cols, cols), tasks = blocks(m.rows, rows) * col_blocks;
  Workspace work(min_threads(threads, tasks), kernel.work_bytes);
  parallel_tasks(threads, tasks, [&](int64_t task, int thread) {
    int64_t row = task / col_blocks * rows, col = task % col_blocks * cols;
    run(m, row, std::min(m.rows, row + rows), col, std::min(m.cols, col + cols), work.piece(thread));
  });
}

}  // namespace fastlm::cpu
