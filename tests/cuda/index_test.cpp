// Checks csrc/cuda/attention_index.h and philox.h against plain loops and against NVIDIA's tables. Prints what is wrong; exits with the
// number of failures.
#include <cstdio>
#include <cstring>
#include <set>
#include <vector>

#include "cuda/attention_index.h"
#include "cuda/philox.h"

using namespace fastlm::cuda::attention;

static int failures = 0;
static void expect(bool condition, const char* what, int a = 0, int b = 0, int c = 0, int d = 0) {
  if (!condition && ++failures < 20) std::printf("%s (%d, %d, %d, %d)\n", what, a, b, c, d);
}

// A mask's ranges against asking every pair.
static void check_mask(int queries, int keys, int lower, int upper, int rows, int cols) {
  Mask mask{queries, keys, lower, upper};
  for (int i = 0; i < queries; ++i) {
    for (int j = 0; j < keys + cols; ++j) {
      bool want = j < keys && j - i >= lower && j - i <= upper;
      expect(mask.visible(i, j) == want, "visible", i, j, lower, upper);
      Mask::Span keys_seen = mask.keys_of(i), seen_by = mask.queries_of(j), next = mask.keys_of(i + 1);
      expect((keys_seen.begin <= j && j < keys_seen.end) == want, "keys of a query", i, j, lower, upper);
      expect((seen_by.begin <= i && i < seen_by.end) == want, "queries of a key", i, j, lower, upper);
      Mask::Span both = keys_seen.both(next);
      expect((both.begin <= j && j < both.end) == (want && next.begin <= j && j < next.end), "keys of both", i, j, lower, upper);
    }
  }
  for (int q0 = 0; q0 < queries; q0 += rows) {
    int begin = keys, end = 0;
    for (int i = q0; i < q0 + rows && i < queries; ++i) {
      for (int j = 0; j < keys; ++j) {
        if (mask.visible(i, j)) {
          if (j < begin) begin = j;
          if (j + 1 > end) end = j + 1;
        }
      }
    }
    bool any = begin < end;
    expect(!any || (mask.key_begin(q0) <= begin && mask.key_end(q0, rows) >= end), "keys left out", q0, lower, upper);
    expect(!any || (mask.key_begin(q0) == begin && mask.key_end(q0, rows) == end), "keys too many", q0, lower, upper);
    expect(mask.key_begin(q0) >= 0 && mask.key_end(q0, rows) <= keys, "keys out of range", q0, lower, upper);
    for (int k0 = 0; k0 < keys; k0 += cols) {
      bool all = true;
      for (int i = q0; i < q0 + rows; ++i) {
        for (int j = k0; j < k0 + cols; ++j) all = all && mask.visible(i, j);
      }
      expect(mask.whole(q0, rows, k0, cols) == all, "whole", q0, k0, lower, upper);
    }
  }
  for (int k0 = 0; k0 < keys; k0 += rows) {
    int begin = queries, end = 0;
    for (int i = 0; i < queries; ++i) {
      for (int j = k0; j < k0 + rows; ++j) {
        if (mask.visible(i, j)) {
          if (i < begin) begin = i;
          end = i + 1;
        }
      }
    }
    bool any = begin < end;
    expect(!any || (mask.query_begin(k0) == begin && mask.query_end(k0, rows) == end), "queries", k0, lower, upper);
    expect(mask.query_begin(k0) >= 0 && mask.query_end(k0, rows) <= queries, "queries out of range", k0, lower, upper);
  }
}

// The diagonals that lengths make of a band: from the last key for the last query, from the first for the first.
static void check_band(int queries, int keys) {
  for (int lower : {-kFar, -3, 0}) {
    for (int upper : {kFar, 2, 0, -1}) {
      for (int upper_from_start : {kFar, 0}) {
        Mask mask = Band{lower, upper, upper_from_start}.mask(queries, keys);
        for (int i = 0; i < queries; ++i) {
          for (int j = 0; j < keys; ++j) {
            int from_end = j - (i + keys - queries);
            bool want = (lower == -kFar || from_end >= lower) && (upper == kFar || from_end <= upper) &&
                        (upper_from_start == kFar || j - i <= upper_from_start);
            expect(mask.visible(i, j) == want, "band", i, j, lower, upper);
          }
        }
        expect(mask.lower >= -queries && mask.upper <= keys && mask.lower <= keys && mask.upper >= -queries, "corners");
      }
    }
  }
}

// Every tile of every sequence has one number, all numbers fit, and wrong ends stay inside.
static void check_packed(const std::vector<int64_t>& ends, int tile_rows) {
  int sequences = int(ends.size()) - 1, total = int(ends.back());
  std::set<std::vector<int>> seen;
  for (int64_t number = 0; number < tile_numbers(total, sequences, tile_rows); ++number) {
    int s = sequence_of(ends.data(), sequences, number, tile_rows);
    int64_t tile = number - first_tile(ends[s], s, tile_rows);
    Rows rows = rows_of(ends.data(), s, total);
    expect(rows.begin == ends[s] && rows.begin + rows.count == ends[s + 1], "rows", s);
    expect(tile >= 0, "tile before its sequence", s);
    if (tile * tile_rows < rows.count) expect(seen.insert({s, int(tile)}).second, "tile twice", s, int(tile));
  }
  size_t tiles = 0;
  for (int s = 0; s < sequences; ++s) tiles += (ends[s + 1] - ends[s] + tile_rows - 1) / tile_rows;
  expect(seen.size() == tiles, "tiles", int(seen.size()), int(tiles));
}

static void check_wrong_ends(const std::vector<int64_t>& ends, int total) {
  int sequences = int(ends.size()) - 1;
  for (int64_t number = 0; number < 40; ++number) {
    int s = sequence_of(ends.data(), sequences, number, 4);
    expect(s >= 0 && s < sequences, "sequence", s);
    Rows rows = rows_of(ends.data(), s, total);
    expect(rows.begin >= 0 && rows.count >= 0 && rows.begin + rows.count <= total, "outside", rows.begin, rows.count);
  }
}

// The known answers that Random123 ships for ten rounds, and dropout's pairs against its single numbers.
static void check_philox() {
  fastlm::cuda::Philox zero(0, 0);
  expect(zero.words[0] == 0x6627e8d5 && zero.words[1] == 0xe169c58d && zero.words[2] == 0xbc57ac4c && zero.words[3] == 0x9b00dbd8,
         "Philox");
  for (uint64_t n = 0; n < 64; ++n) {
    for (uint64_t seed : {uint64_t(0), ~uint64_t(0) - 3}) {
      fastlm::cuda::KeptPair both = fastlm::cuda::kept_pair(n, seed, 1u << 31);
      expect(both.first == fastlm::cuda::kept(n, seed, 1u << 31), "kept", int(n));
      expect(both.second == fastlm::cuda::kept(n + 1, seed, 1u << 31), "kept next", int(n));
    }
  }
}

// Every chunk has a place of its own, and the eight rows of a chunk that ldmatrix reads at once lie in eight different
// groups of banks.
static void check_swizzle(int chunks) {
  std::set<int> seen;
  for (int row = 0; row < 64; ++row) {
    for (int chunk = 0; chunk < chunks; ++chunk) {
      int at = tile_offset(row, chunk, chunks);
      expect(at % 8 == 0 && at >= row * chunks * 8 && at < (row + 1) * chunks * 8, "offset out of its row", row, chunk);
      expect(seen.insert(at).second, "offset used twice", row, chunk);
    }
  }
  for (int row = 0; row < 64; row += 8) {
    for (int chunk = 0; chunk < chunks; ++chunk) {
      std::set<int> groups;
      for (int r = 0; r < 8; ++r) groups.insert(tile_offset(row + r, chunk, chunks) / 8 % 8);
      expect(groups.size() == 8, "bank conflict", row, chunk, chunks);
    }
  }
}

// What ldmatrix.x4 hands out: lane l gets elements (l / 4, 2 (l % 4) + {0, 1}) of each matrix, (column, row) when
// transposed. Element of register `reg`, half `half`, as (row, column) of the tile that `address` walks over.
struct Element {
  int row, col;
};
static Element loaded(LaneAddress (*address)(int), int lane, int reg, int half, bool transposed) {
  int inner_row = transposed ? 2 * (lane % 4) + half : lane / 4, inner_col = transposed ? lane / 4 : 2 * (lane % 4) + half;
  LaneAddress at = address(8 * reg + inner_row);  // this lane's address names that row of matrix `reg`
  return {at.row, 8 * at.chunk + inner_col};
}

// PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type".
static void check_fragments() {
  for (int lane = 0; lane < 32; ++lane) {
    int group = lane / 4, in_group = lane % 4;
    for (int i = 0; i < 8; ++i) {  // a0 ... a7: register i / 2, half i % 2
      int row = (i < 2 || (4 <= i && i < 6)) ? group : group + 8, col = in_group * 2 + (i & 1) + (i >= 4 ? 8 : 0);
      Element got = loaded(a_address, lane, i / 2, i % 2, false);
      expect(got.row == row && got.col == col, "A", lane, i, got.row, got.col);
    }
    for (int i = 0; i < 4; ++i) {  // b0 ... b3 of two B side by side
      int k = in_group * 2 + (i & 1) + (i >= 2 ? 8 : 0), n = group;
      for (int tile = 0; tile < 2; ++tile) {
        Element got = loaded(b_address, lane, 2 * tile + i / 2, i % 2, false);  // rows of that tile are columns of B
        expect(got.row == n + 8 * tile && got.col == k, "B", lane, i, got.row, got.col);
        got = loaded(b_transposed_address, lane, 2 * tile + i / 2, i % 2, true);
        expect(got.row == k && got.col == n + 8 * tile, "B transposed", lane, i, got.row, got.col);
      }
    }
    for (int i = 0; i < 4; ++i) {  // c0 ... c3
      expect(acc_row(lane, i) == (i < 2 ? group : group + 8), "C row", lane, i);
      expect(acc_col(lane, i) == in_group * 2 + (i & 1), "C column", lane, i);
    }
    // Two accumulators side by side, packed in pairs, are the A operand of the next product.
    for (int reg = 0; reg < 4; ++reg) {
      for (int half = 0; half < 2; ++half) {
        int tile = reg / 2, e = 2 * (reg % 2) + half;
        Element want = loaded(a_address, lane, reg, half, false);
        expect(acc_row(lane, e) == want.row && acc_col(lane, e) + 8 * tile == want.col, "C as A", lane, reg, half);
      }
    }
  }
}

int main() {
  for (int queries : {1, 5, 16, 33}) {
    for (int keys : {1, 7, 16, 40}) {
      for (int lower : {-queries, keys - queries - 3, -2, 0, 2}) {
        for (int upper : {keys, keys - queries, 0, 3, -2, -queries}) check_mask(queries, keys, lower, upper, 8, 4);
      }
    }
  }
  for (int queries : {1, 5, 9}) {
    for (int keys : {0, 1, 6, 11}) check_band(queries, keys);
  }
  for (int tile_rows : {1, 4, 7, 16}) {
    for (const auto& ends : {std::vector<int64_t>{0, 9}, {0, 3, 3, 20, 21}, {0, 0, 0, 5}, {0, 16, 32, 32}, {0, 0}}) check_packed(ends, tile_rows);
  }
  check_wrong_ends({0, 30, 10, 20}, 20);
  check_wrong_ends({-7, 5, 1ll << 60, 3}, 20);
  for (int chunks : {8, 12, 16, 24, 32}) check_swizzle(chunks);
  check_fragments();
  check_philox();
  if (failures > 0) std::printf("%d failures\n", failures);
  return failures < 255 ? failures : 255;
}
