// Matrix products of any size: a tile of C sums up over blocks of the depth, for each of which the parts of A and B that it
// needs are packed (Goto and van de Geijn, https://doi.org/10.1145/1356052.1356053).
#include "gemm-inl.h"
#include "matmul.h"

namespace fastlm::cpu::FASTLM_ISA {
namespace {

// Words of depth at a time: a panel of B, kPanelOf wide, then fills about three quarters of 32 KB.
constexpr int64_t kDepthBlock = 192;
template <class W> constexpr int64_t kPanelOf = kBlockVectors * word_lanes<W>;

template <class T> struct MatmulTiles {
  using W = word_t<T>;
  // Wide tiles, since A is packed once for each: the part of C is streamed, not kept, and yet 4 % is won.
  static constexpr int64_t kRows = 256, kCols = 1024 / kPanelOf<W> * kPanelOf<W>;
  static constexpr int64_t kBytes = ((kRows + kCols) * kDepthBlock + kRows * kCols) * sizeof(float);
  static_assert(sizeof(W) == sizeof(float) && kRows % word_lanes<W> == 0 && kRows % kBlockRows<W> == 0);
  W *a, *b;  // (rows, depth), or where A is turned panels of (depth, lanes); panels of (depth, kPanelOf)
  float* c;  // panels of (rows, kPanelOf)

  explicit MatmulTiles(void* work)
      : a(static_cast<W*>(work)), b(a + kRows * kDepthBlock), c(reinterpret_cast<float*>(b + kCols * kDepthBlock)) {}
};

// A block of A against a panel of B: `vectors` of C for each of the rows.
template <class W, Left kLeft, int kVectors>
inline void matmul_panel(int64_t rows, int64_t words, const W* a, const W* b, float* c) {
  constexpr int64_t kL = word_lanes<W>, kPanel = kPanelOf<W>;
  for (int64_t r = 0; r < rows; r += kBlockRows<W>) {
    const W* left = kLeft == Left::kByRows ? a + r * kDepthBlock : a + r / kL * kDepthBlock * kL + r % kL;
    product_block<W, kLeft, Into::kAdd, kVectors>(words, left, kLeft == Left::kByRows ? kDepthBlock : kL, b, kPanel,
                                                  c + r * kPanel, kPanel, 1);
  }
}

template <class W, Left kLeft>
inline void matmul_panel(int64_t width, int64_t rows, int64_t words, const W* a, const W* b, float* c) {
  constexpr int64_t kL = word_lanes<W>;
  auto run = width <= kL       ? matmul_panel<W, kLeft, 1>
             : width <= 2 * kL ? matmul_panel<W, kLeft, 2>
                               : matmul_panel<W, kLeft, kBlockVectors>;
  run(rows, words, a, b, c);
}

// Rows of elements to panels of words that span rows, each panel kWidth wide and kDepthBlock deep. A few rows at a time:
// panels share cache lines, and rows that lie a power of two apart would put each other out of the cache.
template <int64_t kWidth, class W, class T>
inline void pack_panels(const T* src, int64_t stride, int64_t depth, int64_t cols, W* dst) {
  constexpr int64_t kTerms = terms_of<W>, kRows = 8;
  for (int64_t k = 0; k < depth; k += kRows) {
    const int64_t rows = smaller(kRows, depth - k);
    for (int64_t n = 0; n < cols; n += kWidth) {
      pack_depth(src + k * stride + n, stride, rows, smaller(kWidth, cols - n), dst + n * kDepthBlock + k / kTerms * kWidth,
                 kWidth, round_up(rows, kTerms));
    }
  }
}

template <class T>
void matmul_tile(const Matmul& m, int64_t row, int64_t row_end, int64_t col, int64_t col_end, void* work) {
  using W = word_t<T>;
  constexpr int64_t kL = word_lanes<W>, kTerms = terms_of<W>, kPanel = kPanelOf<W>;
  const MatmulTiles<T> t(work);
  [[maybe_unused]] const ProductScope<W> scope;
  const T *a = static_cast<const T*>(m.a), *b = static_cast<const T*>(m.b);
  const int64_t rows = row_end - row, cols = col_end - col, padded = round_up(rows, kBlockRows<W>);
  for (int64_t i = 0; i < round_up(cols, kPanel) * padded; i += kL) store(t.c + i, sum_vec<W>{});

  for (int64_t k = 0; k < m.depth; k += kDepthBlock * kTerms) {
    const int64_t depth = smaller(kDepthBlock * kTerms, m.depth - k), words = (depth + kTerms - 1) / kTerms;
    if (m.a_turned) {
      pack_panels<kL, W>(a + k * m.a_stride + row, m.a_stride, depth, rows, t.a);
    } else {
      pack_rows(a + row * m.a_stride + k, m.a_stride, rows, depth, t.a, kDepthBlock, padded);
    }
    if (!m.b_turned) pack_panels<kPanel, W>(b + k * m.b_stride + col, m.b_stride, depth, cols, t.b);
    for (int64_t n = 0; n < cols; n += kPanel) {
      const int64_t width = smaller(kPanel, cols - n);
      W* panel = t.b + n * kDepthBlock;
      if (m.b_turned) {
        pack_transposed(b + (col + n) * m.b_stride + k, m.b_stride, width, depth, panel, kPanel, kPanel);
      }
      (m.a_turned ? matmul_panel<W, Left::kByDepth> : matmul_panel<W, Left::kByRows>)(width, padded, words, t.a, panel,
                                                                                      t.c + n * padded);
    }
  }

  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t n = 0; n < cols; n += kL) {
      const int count = static_cast<int>(smaller(kL, cols - n));
      float* at = m.c + (row + r) * m.c_stride + col + n;
      f32v sum = load(t.c + n / kPanel * kPanel * padded + r * kPanel + n % kPanel);
      store_count(at, m.add ? load_count(at, count) + sum : sum, count);
    }
  }
}

constexpr MatmulKernels kMatmulKernels = {{matmul_tile<float>, matmul_tile<bf16>, matmul_tile<f16>, nullptr},
                                          MatmulTiles<float>::kRows,
                                          MatmulTiles<float>::kCols,
                                          MatmulTiles<float>::kBytes};

}  // namespace
}  // namespace fastlm::cpu::FASTLM_ISA
