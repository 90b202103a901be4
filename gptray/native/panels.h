// Packs the operands of training into panels of bf16 words; gemm.h has their layout.
// All threads of a parallel region call `pack_rows`, `pack_columns` and `pack_panels`.

#pragma once

#include <algorithm>
#include <vector>

#include "gemm.h"

namespace {

// Storage for a `Words`.
struct alignas(64) Line {
  int32_t words[LANES];
};

// A buffer of at least `size` elements; its old contents may be lost.
template <typename T>
T *scratch(std::vector<T> &vector, size_t size) {
  if (vector.size() < size) vector.resize(size);
  return vector.data();
}

// Write words k .. k + ABREAST - 1 of 16 columns, but only to `count`, into panels of `width`
// columns: words(k) gives one.
template <typename Get>
inline void put_words(int32_t *panel, size_t width, int k, int column, int count,
                      const Get &words) {
  Words word = words(k);
  int32_t *const to = panel + k * width;
  if constexpr (IN_PAIRS)
    if (k + 1 < count) {
      Words next = words(k + 1);
      zip(word, next);
      store(to + 2 * column, word), store(to + 2 * column + LANES, next);
      return;
    }
  store(to + column, word);
}

// Pack 16 rows of `count` words into block `block` of panels; words(r, k) gives 16 words of the
// block's row r from word k on.
template <typename Get>
inline void pack_block(const Get &words, Words *panels, int block, int count) {
  int32_t *const panel = (int32_t *)(panels + (size_t)(block / BLOCKS) * count * BLOCKS);
  for (int k = 0; k < count; k += LANES) {
    Words square[LANES];
#pragma GCC unroll 16
    for (int r = 0; r < LANES; ++r) square[r] = words(r, k);
    transpose(square);
    for (int i = k; i < std::min(k + LANES, count); i += ABREAST)
      put_words(panel, PANEL, i, block % BLOCKS * LANES, count,
                [&](int at) { return square[at - k]; });
  }
}

// The first `count` of 32 numbers as 16 words, the rest 0; count even.
inline Words words_of(const float *from, int count) {
  const Floats low = load(from, lanes(count)), high = load(from + LANES, lanes(count - LANES));
  return to_words(low, high);
}
inline Words words_of(const uint16_t *from, int count) {
  return load((const int32_t *)from, lanes(count / 2));
}

// `rows` rows of K numbers, fp32 or bf16 -> block `block` of panels, words along K.
template <typename Number>
void pack_row_block(const Number *w, int rows, Words *panels, int block, int K) {
  pack_block(
      [&](int r, int k) { return words_of(w + (size_t)r * K + 2 * k, r < rows ? K - 2 * k : 0); },
      panels, block, K / 2);
}

// W (N, K), fp32 or bf16, -> panels of 64 rows, words along K.
template <typename Number>
void pack_rows(const Number *w, Words *panels, int N, int K) {
#pragma omp for schedule(static)
  for (int block = 0; block < panel_count(N) * BLOCKS; ++block)
    pack_row_block(w + (size_t)block * LANES * K, N - block * LANES, panels, block, K);
}

// A gated layer has 2 N rows, first gates, then inputs; a panel has 32 gates and then their inputs.
constexpr int GATES = PANEL / 2;

inline int gated_panel_count(int N) { return (N + GATES - 1) / GATES; }

// The index of a panel column's gate, also for the column of an input.
inline int gate_of(int column) { return column / PANEL * GATES + column % GATES; }

inline bool is_gate(int column) { return column % PANEL < GATES; }

// W (2 N, K), fp32 or bf16, -> panels of gates and inputs, words along K.
template <typename Number>
void pack_gated_rows(const Number *w, Words *panels, int N, int K) {
#pragma omp for schedule(static)
  for (int block = 0; block < gated_panel_count(N) * BLOCKS; ++block) {
    const int column = block * LANES, row = gate_of(column);
    const Number *from = w + (size_t)(is_gate(column) ? row : N + row) * K;
    pack_row_block(from, N - row, panels, block, K);
  }
}

// Words of two rows' numbers; masks say how many each row has.
inline Words pair_of(const float *even, const float *odd, Mask mask, Mask odd_mask) {
  return pair(load(even, mask), load(odd, odd_mask));
}
inline Words pair_of(const uint16_t *even, const uint16_t *odd, Mask mask, Mask odd_mask) {
  return pair(load_halves(even, mask), load_halves(odd, odd_mask));
}

// W (N, K), fp32 or bf16, -> panels of 64 columns, words along N; an odd last row is paired with
// zeros.
template <typename Number>
void pack_columns(const Number *w, Words *panels, int N, int K) {
  const int count = (N + 1) / 2;
#pragma omp for collapse(2) schedule(static)
  for (int panel = 0; panel < panel_count(K); ++panel)
    for (int n = 0; n < count; n += ABREAST)
      for (int b = 0; b < BLOCKS; ++b) {
        const int column = panel * PANEL + b * LANES;
        put_words((int32_t *)(panels + (size_t)panel * count * BLOCKS), PANEL, n, b * LANES, count,
                  [&](int n) {
                    const Mask mask = lanes(K - column), odd = 2 * n + 1 < N ? mask : 0;
                    const Number *from = w + (size_t)2 * n * K + column;
                    return pair_of(from, from + K, mask, odd);
                  });
      }
}

// Words of so many numbers, rounded up to whole pairs if panels have pairs.
inline int whole_words(int numbers) {
  return (numbers + 2 * ABREAST - 1) / (2 * ABREAST) * ABREAST;
}

// Words of a column of M rows, rounded up to whole tiles if there are tiles.
inline int column_words(int M) {
  constexpr int whole = HAS_TILES ? LANES : 1;
  return (whole_words(M) + whole - 1) / whole * whole;
}

// Word k of 16 columns of a panel.
inline Words word_of(const Words *panel, int count, int k, int block) {
  if (!IN_PAIRS) return panel[(size_t)k * BLOCKS + block];
  int32_t words[LANES];
  for (int i = 0; i < LANES; ++i)
    words[i] = ((const int32_t *)panel)[place_in_panel(k, block * LANES + i, count)];
  return load(words);
}

// `columns` <= 64 columns of rows (M, stride) in bf16 -> a panel, words along M.
void pack_panel(const uint16_t *x, size_t stride, Words *panel, int M, int columns) {
  const int words = whole_words(M);
  for (int k = 0; k < words; k += ABREAST)
    for (int b = 0; b < BLOCKS; ++b)
      put_words((int32_t *)panel, PANEL, k, b * LANES, words, [&](int k) {
        const Mask mask = IN_PAIRS && 2 * k >= M ? 0 : lanes(columns - b * LANES);
        const Mask odd = 2 * k + 1 < M ? mask : 0;
        const uint16_t *from = x + 2 * k * stride + b * LANES;
        return pair_of(from, from + stride, mask, odd);
      });
  std::fill(panel + words * BLOCKS, panel + column_words(M) * BLOCKS, Words{});
}

// The left operand of a product of two panels: registers read it as it is, tiles need it transposed
// to [16 words][64 columns][16 words].
constexpr int LEFT_STEP = HAS_TILES ? LANES : ABREAST;  // stride from column to column

void transpose_left(Words *panel, int words) {
  if (!HAS_TILES) return;
  for (int k = 0; k < words; k += LANES, panel += LANES * BLOCKS) {
    Words squares[BLOCKS][LANES];
    for (int i = 0; i < LANES * BLOCKS; ++i) squares[i % BLOCKS][i / BLOCKS] = panel[i];
    for (int b = 0; b < BLOCKS; ++b) {
      transpose(squares[b]);
      std::copy_n(squares[b], LANES, panel + b * LANES);
    }
  }
}

// Rows (M, K) bf16 -> panels of 64 columns, words along M.
void pack_panels(const uint16_t *x, Words *panels, int M, int K) {
  const size_t size = (size_t)column_words(M) * BLOCKS;
#pragma omp for schedule(static)
  for (int panel = 0; panel < panel_count(K); ++panel)
    pack_panel(x + panel * PANEL, K, panels + panel * size, M, K - panel * PANEL);
}

}  // namespace
