// Who sees whom, and what lies where: the index arithmetic of the attention kernels. Plain C++, so that a test can check
// each function by itself.
#pragma once

#include <cstdint>

#include "../host_device.h"

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

  // What query i sees, and what sees key j: nothing where end <= begin.
  struct Span {
    int begin, end;

    FASTLM_HOST_DEVICE Span both(Span other) const {
      return {begin > other.begin ? begin : other.begin, end < other.end ? end : other.end};
    }
  };
  FASTLM_HOST_DEVICE Span keys_of(int i) const {
    int end = i + upper + 1;
    return {i + lower, end < keys ? end : keys};
  }
  FASTLM_HOST_DEVICE Span queries_of(int j) const {
    int end = j - lower + 1;
    return {j - upper, j >= keys ? j - upper : end < queries ? end : queries};
  }

  // Each of the queries q0 ... q0 + rows - 1 sees all of the keys k0 ... k0 + cols - 1: the tile needs no mask.
  FASTLM_HOST_DEVICE bool whole(int q0, int rows, int k0, int cols) const {
    return k0 + cols <= keys && k0 + cols - 1 <= q0 + upper && q0 + rows - 1 + lower <= k0;
  }

 private:
  FASTLM_HOST_DEVICE static int clamp(int at, int end) { return at < 0 ? 0 : at < end ? at : end; }
};

// The diagonals before lengths are known, which packed sequences have one by one: from the last key for the last query,
// and, for a mask aligned top-left, from the first for the first. kFar: unbounded.
constexpr int kFar = 1 << 30;
struct Band {
  int lower, upper, upper_from_start;

  FASTLM_HOST_DEVICE Mask mask(int queries, int keys) const {
    int last = keys - queries;
    int high = upper < kFar ? last + upper : kFar;
    if (upper_from_start < high) high = upper_from_start;
    return {queries, keys, within(lower > -kFar ? last + lower : -kFar, queries, keys), within(high, queries, keys)};
  }

 private:
  // Diagonals farther out than the corners mean the same as the corners.
  FASTLM_HOST_DEVICE static int within(int at, int queries, int keys) {
    return at < -queries ? -queries : at > keys ? keys : at;
  }
};

// --- packed sequences -------------------------------------------------------------------------------------------------
// Sequence s is rows ends[s] ... ends[s + 1] - 1 of `total`. Its tiles have numbers from first_tile(ends[s], s) on, whose
// ranges do not overlap, so that a block finds its sequence by bisection, and the host needs no length to launch
// tile_numbers() of them; numbers past a sequence's last tile stay idle. What `ends` says wrongly leads outside of no
// tensor.
FASTLM_HOST_DEVICE inline int64_t first_tile(int64_t end, int sequence, int tile_rows) { return end / tile_rows + sequence; }
FASTLM_HOST_DEVICE inline int64_t tile_numbers(int64_t total, int sequences, int tile_rows) {
  return total / tile_rows + sequences;
}

struct Rows {
  int begin, count;
};
FASTLM_HOST_DEVICE inline Rows rows_of(const int64_t* ends, int sequence, int total) {
  int64_t begin = ends[sequence], end = ends[sequence + 1];
  begin = begin < 0 ? 0 : begin > total ? total : begin;
  end = end < begin ? begin : end > total ? total : end;
  return {int(begin), int(end - begin)};
}

FASTLM_HOST_DEVICE inline int sequence_of(const int64_t* ends, int sequences, int64_t tile, int tile_rows) {
  int low = 0, high = sequences - 1;
  while (low < high) {
    int middle = (low + high + 1) / 2;
    if (first_tile(ends[middle], middle, tile_rows) <= tile) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// --- tiles of 16-bit elements in shared memory ------------------------------------------------------------------------
// Rows of `chunks` chunks of 8 elements (16 bytes), chunks a multiple of 4. Chunks change places within their group of 8,
// or of 4 where the last group is half a one, so that 8 rows of one chunk, which ldmatrix reads at once, fall into 8
// different groups of banks. In elements.
FASTLM_HOST_DEVICE inline int tile_offset(int row, int chunk, int chunks) {
  return (row * chunks + (chunk ^ (chunks % 8 == 0 ? row & 7 : row >> 1 & 3))) * 8;
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
