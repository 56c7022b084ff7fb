// Who sees whom, and what lies where: the index arithmetic of the attention kernels. Plain C++, so that a test can check
// each function by itself.
#pragma once

#ifdef __CUDACC__
#define FASTLM_HOST_DEVICE __host__ __device__
#else
#define FASTLM_HOST_DEVICE
#endif

namespace fastlm::cuda::attention {

// --- visibility -------------------------------------------------------------------------------------------------------
// Query i sees key j where i + lower <= j <= i + upper: both causal alignments, windows and no mask at all are choices of
// the two diagonals, which lie within -queries and keys. It does not ask whether i < queries: rows past the end are
// computed on zeros and never stored.
struct Mask {
  int queries, keys, lower, upper;

  FASTLM_HOST_DEVICE bool visible(int i, int j) const { return i + lower <= j && j <= i + upper && j < keys; }

  // Outside of [key_begin, key_end) no key is seen by any of the queries q0 ... q0 + rows - 1.
  FASTLM_HOST_DEVICE int key_begin(int q0) const { return clamp(q0 + lower, keys); }
  FASTLM_HOST_DEVICE int key_end(int q0, int rows) const {
    int last = q0 + rows < queries ? q0 + rows - 1 : queries - 1;
    return clamp(last + upper + 1, keys);
  }

  // Outside of [query_begin, query_end) no query sees any of the keys k0 ... k0 + rows - 1.
  FASTLM_HOST_DEVICE int query_begin(int k0) const { return clamp(k0 - upper, queries); }
  FASTLM_HOST_DEVICE int query_end(int k0, int rows) const {
    int last = k0 + rows < keys ? k0 + rows - 1 : keys - 1;
    return clamp(last - lower + 1, queries);
  }

  // Each of the queries q0 ... q0 + rows - 1 sees all of the keys k0 ... k0 + cols - 1: the tile needs no mask.
  FASTLM_HOST_DEVICE bool whole(int q0, int rows, int k0, int cols) const {
    return k0 + cols <= keys && k0 + cols - 1 <= q0 + upper && q0 + rows - 1 + lower <= k0;
  }

 private:
  FASTLM_HOST_DEVICE static int clamp(int at, int end) { return at < 0 ? 0 : at < end ? at : end; }
};

// --- tiles of 16-bit elements in shared memory ------------------------------------------------------------------------
// Rows of `chunks` chunks of 8 elements (16 bytes), chunks a multiple of 8. Chunk c of row r lies at position c ^ (r % 8):
// 8 rows of one chunk, which ldmatrix reads at once, then fall into 8 different groups of banks. In elements.
FASTLM_HOST_DEVICE inline int tile_offset(int row, int chunk, int chunks) {
  return (row * chunks + (chunk ^ (row & 7))) * 8;
}

// --- fragments of mma.m16n8k16 ----------------------------------------------------------------------------------------
// Element e (0-3) of the accumulator (16 x 8) that a lane holds. Elements 0, 1 of tile 2 k and of tile 2 k + 1 are then
// also registers 0 and 2 of the next product's A operand, elements 2, 3 registers 1 and 3: P needs no trip through
// shared memory.
FASTLM_HOST_DEVICE inline int acc_row(int lane, int e) { return lane / 4 + 8 * (e / 2); }
FASTLM_HOST_DEVICE inline int acc_col(int lane, int e) { return 2 * (lane % 4) + e % 2; }

// The row and chunk whose address a lane gives to ldmatrix.x4, for
//   A (16 x 16)                       from a tile of rows of A,
//   two B (16 x 8) side by side       from a tile whose rows are columns of B,
//   two B (16 x 8), transposed load   from a tile of rows of B.
struct LaneAddress {
  int row, chunk;
};
FASTLM_HOST_DEVICE inline LaneAddress a_address(int lane) { return {lane % 16, lane / 16}; }
FASTLM_HOST_DEVICE inline LaneAddress b_address(int lane) { return {lane % 8 + 8 * (lane / 16), lane / 8 % 2}; }
FASTLM_HOST_DEVICE inline LaneAddress b_transposed_address(int lane) { return {lane % 16, lane / 16}; }

}  // namespace fastlm::cuda::attention
