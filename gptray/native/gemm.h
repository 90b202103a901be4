// Products of rows by panels, in tiles of up to 6 rows by 64 columns.
//
// One side of a product gives a word to all lanes, for each row of a tile; the other side is packed
// into panels: [panel of 64 columns][word][64 columns]. Each sum runs in one fixed order.

#pragma once

#include <cstddef>

#include "simd.h"

namespace {

constexpr int BLOCKS = 4, PANEL = LANES * BLOCKS;
constexpr int TILE = 6;        // rows at once: 24 sums, 4 weights and a word in 32 registers
constexpr int ROW_BLOCK = 96;  // most rows that use a panel while it is near

// Blocks of about the same height, so that threads share them evenly: how many there are of M rows,
// and the first row of each.
inline int row_blocks(int M) { return (M + ROW_BLOCK - 1) / ROW_BLOCK; }

inline int block_start(int block, int M) { return (int64_t)M * block / row_blocks(M); }

inline int panel_count(int columns) { return (columns + PANEL - 1) / PANEL; }

// How a word is multiplied by another and added to a sum, for each kind of numbers.
struct Fp32 {
  using Sum = Floats;
  static Sum zero() { return _mm512_setzero_ps(); }
  static Sum add(Sum sum, Words x, Words w) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(x), _mm512_castsi512_ps(w), sum);
  }
};

struct Bf16 {
  using Sum = Floats;
  static Sum zero() { return _mm512_setzero_ps(); }
  static Sum add(Sum sum, Words x, Words w) {
    return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)w);
  }
};

struct Int8 {  // x is signed, w is unsigned
  using Sum = Words;
  static Sum zero() { return _mm512_setzero_si512(); }
  static Sum add(Sum sum, Words x, Words w) {
    // Around the intrinsic GCC 12 moves every sum to memory and back, at half the speed.
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
    return sum;
  }
};

// Words of one side of a product: of row r at place k.
struct Rows {
  const int32_t *words;
  size_t row, place;  // steps
};

// Sums that begin at nothing.
template <typename Kind>
struct FromZero {
  typename Kind::Sum operator()(int, int) const { return Kind::zero(); }
};

// ROWS rows by a panel of `count` words; begin(r, b) gives each sum, end(r, b, sum) takes it.
template <typename Kind, int ROWS, typename Begin, typename End>
inline void tile(Rows x, const Words *panel, int count, const Begin &begin, const End &end) {
  typename Kind::Sum sums[ROWS][BLOCKS];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int b = 0; b < BLOCKS; ++b) sums[r][b] = begin(r, b);
  const int32_t *words = x.words;
  for (int k = 0; k < count; ++k, panel += BLOCKS, words += x.place) {
    // By name: of an array GCC 12 keeps a copy in memory.
    Words w0 = _mm512_loadu_si512(panel), w1 = _mm512_loadu_si512(panel + 1);
    Words w2 = _mm512_loadu_si512(panel + 2), w3 = _mm512_loadu_si512(panel + 3);
    if (ROWS > 1) asm("" : "+v"(w0), "+v"(w1), "+v"(w2), "+v"(w3));  // or each row loads them again
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const Words word = _mm512_set1_epi32(words[r * x.row]);
      sums[r][0] = Kind::add(sums[r][0], word, w0);
      sums[r][1] = Kind::add(sums[r][1], word, w1);
      sums[r][2] = Kind::add(sums[r][2], word, w2);
      sums[r][3] = Kind::add(sums[r][3], word, w3);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int b = 0; b < BLOCKS; ++b) end(r, b, sums[r][b]);
}

template <typename Kind, typename Begin, typename End>
inline void product(int rows, Rows x, const Words *panel, int count, const Begin &begin,
                    const End &end) {
  switch (rows) {
    case 1: return tile<Kind, 1>(x, panel, count, begin, end);
    case 2: return tile<Kind, 2>(x, panel, count, begin, end);
    case 3: return tile<Kind, 3>(x, panel, count, begin, end);
    case 4: return tile<Kind, 4>(x, panel, count, begin, end);
    case 5: return tile<Kind, 5>(x, panel, count, begin, end);
    default: return tile<Kind, TILE>(x, panel, count, begin, end);
  }
}

// Call run(row, rows) for tiles of about the same height, at most `most`, that make up rows first
// .. stop - 1.
template <typename Run>
inline void in_tiles(int first, int stop, const Run &run, int most = TILE) {
  for (int row = first, rows; row < stop; row += rows) {
    const int left = (stop - row + most - 1) / most;
    rows = (stop - row + left - 1) / left;
    run(row, rows);
  }
}

}  // namespace
