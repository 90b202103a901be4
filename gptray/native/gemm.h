// Products of rows by panels, up to TILE rows by 64 columns at once: in vector registers, or in
// tiles if the processor has them.
//
// One side is read a word per row, broadcast to all lanes; the other side is packed into panels
// (panel_layout.h). Each sum runs in one fixed order.

#pragma once

#include <algorithm>
#include <cassert>
#include <cstddef>

#include "panel_layout.h"

namespace {

// For each kind of number: how to unpack a word of weights, how to multiply it by another word and
// add it to a sum, the number of rows from which to use tiles, and whether panels have pairs.
struct Fp32 {
  static constexpr bool PAIRED = false;
  static constexpr int TILED_FROM = 0;  // never
  using Sum = Floats;
  static Words weights(Words w) { return w; }
  static Sum add(Sum sum, Words x, Words w) { return fmadd(as_floats(x), as_floats(w), sum); }
};

struct Bf16 {
  static constexpr bool PAIRED = IN_PAIRS;
  static constexpr int TILED_FROM = 1;  // always: tiles round differently from registers
  using Sum = Floats;
  static Words weights(Words w) { return w; }
  static Sum add(Sum sum, Words x, Words w) { return dot_bf16(sum, x, w); }
  static Sum plus(Sum sum, const int32_t *words) { return sum + load((const float *)words); }
  template <int C, int A, int B>
  static void add_tiles() {
    multiply_bf16_tiles<C, A, B>();
  }
};

// Packed weights have 128 added.
struct Int8 {
  static constexpr bool PAIRED = IN_PAIRS;
  static constexpr int TILED_FROM = IN_REGISTERS + 1;  // sums are exact either way
  using Sum = Words;
  static Words weights(Words w) { return biased(w); }
  static Sum add(Sum sum, Words x, Words w) { return dot_bytes(sum, x, w); }
  static Sum plus(Sum sum, const int32_t *words) { return ::add(sum, load(words)); }
  template <int C, int A, int B>
  static void add_tiles() {
    multiply_int8_tiles<C, A, B>();
  }
};

// The unpacked side of a product: the strides from row to row and from word to word. In products by
// pairs, an odd word stands beside the even one before it.
struct Rows {
  const int32_t *words;
  size_t row, place;  // strides
};

// Sums that start from 0.
template <typename Kind>
struct FromZero {
  typename Kind::Sum operator()(int, int) const { return typename Kind::Sum{}; }
};

// What else a product does while it multiplies: nothing.
struct Nothing {
  void operator()(int) const {}
};

// Add to the sums of ROWS rows the products of a word of each, `row` apart, by a panel's words.
template <typename Kind, int ROWS>
inline void add_word(typename Kind::Sum (&sums)[ROWS][BLOCKS], const int32_t *words, size_t row,
                     const int32_t *panel) {
  // Not an array: GCC 12 would keep a copy of it in memory.
  Words w0 = Kind::weights(load(panel)), w1 = Kind::weights(load(panel + LANES));
  Words w2 = Kind::weights(load(panel + 2 * LANES)), w3 = Kind::weights(load(panel + 3 * LANES));
  if (ROWS > 1) keep_in_registers(w0, w1, w2, w3);
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
    const Words word = splat(words[r * row]);
    sums[r][0] = Kind::add(sums[r][0], word, w0);
    sums[r][1] = Kind::add(sums[r][1], word, w1);
    sums[r][2] = Kind::add(sums[r][2], word, w2);
    sums[r][3] = Kind::add(sums[r][3], word, w3);
  }
}

// The same for one block of a panel.
template <typename Kind, int ROWS>
inline void add_word(typename Kind::Sum (&sums)[ROWS][1], const int32_t *words, size_t row,
                     const int32_t *panel) {
  const Words w = Kind::weights(load(panel));
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) sums[r][0] = Kind::add(sums[r][0], splat(words[r * row]), w);
}

// ROWS rows by a panel of `count` words: begin(r, b) gives each sum its start, end(r, b, sum) takes
// the result, and meanwhile(words) is called whenever so many words are multiplied; not for a
// single row in registers, where the processor runs far enough ahead by itself.
template <typename Kind, int ROWS, typename Begin, typename End, typename Meanwhile>
inline void tile(Rows x, const Words *panel, int count, const Begin &begin, const End &end,
                 const Meanwhile &meanwhile) {
  for (int first = 0; first < BLOCKS; first += AT_ONCE) {
    typename Kind::Sum sums[ROWS][AT_ONCE];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
      for (int b = 0; b < AT_ONCE; ++b) sums[r][b] = begin(r, first + b);
    const int32_t *words = x.words, *w = (const int32_t *)(panel + first);
    for (int k = 0; k < count; ++k, w += PANEL, words += x.place) {
      if (ROWS > 1) meanwhile(1);
      add_word<Kind, ROWS>(sums, words, x.row, w);
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
      for (int b = 0; b < AT_ONCE; ++b) end(r, first + b, sums[r][b]);
  }
}

// As `tile`, of ROWS rows, or one less, by the first USED blocks of a panel in pairs.
template <typename Kind, int ROWS, int USED = BLOCKS, typename Begin, typename End,
          typename Meanwhile = Nothing>
inline void paired_tile(int rows, Rows x, const Words *panel, int count, const Begin &begin,
                        const End &end, const Meanwhile &meanwhile = {}) {
  const int even = count / 2 * 2;
  const auto actual = [&](int r) { return r < ROWS - 1 ? r : rows - 1; };
  for (int b = 0; b < USED; ++b) {
    typename Kind::Sum sums[ROWS][1];
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; ++r) sums[r][0] = begin(actual(r), b);
    meanwhile(count);
    const int32_t *const w = (const int32_t *)(panel + 2 * b);
    add_pairs(sums, rows, even / 2, x.words, x.row, 2 * x.place,
              [=](int k, int half) { return load(w + 2 * k * PANEL + half * LANES); });
    if (even < count) {
      const Words last = load((const int32_t *)(panel + even * BLOCKS + b));
#pragma GCC unroll 6
      for (int r = 0; r < ROWS; ++r) {
        const int32_t word = x.words[even * x.place + actual(r) * x.row];
        sums[r][0] = Kind::add(sums[r][0], splat(word), last);
      }
    }
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; ++r)
      if (r < ROWS - 1 || r < rows) end(r, b, sums[r][0]);
  }
}

template <typename Kind, typename Begin, typename End, typename Meanwhile = Nothing>
inline void register_product(int rows, Rows x, const Words *panel, int count, const Begin &begin,
                             const End &end, const Meanwhile &meanwhile = {}) {
  if constexpr (Kind::PAIRED) switch ((rows + 1) / 2) {
      case 1: return paired_tile<Kind, 2>(rows, x, panel, count, begin, end, meanwhile);
      case 2: return paired_tile<Kind, 4>(rows, x, panel, count, begin, end, meanwhile);
      default: return paired_tile<Kind, 6>(rows, x, panel, count, begin, end, meanwhile);
    }
  switch (rows) {
    case 1: return tile<Kind, 1>(x, panel, count, begin, end, meanwhile);
    case 2: return tile<Kind, 2>(x, panel, count, begin, end, meanwhile);
    case 3: return tile<Kind, 3>(x, panel, count, begin, end, meanwhile);
    case 4: return tile<Kind, 4>(x, panel, count, begin, end, meanwhile);
    case 5: return tile<Kind, std::min(5, IN_REGISTERS)>(x, panel, count, begin, end, meanwhile);
    default: return tile<Kind, IN_REGISTERS>(x, panel, count, begin, end, meanwhile);
  }
}

// Call run(row, rows) for tiles of about the same height, at most `most`, that cover rows first ..
// stop - 1.
template <typename Run>
inline void in_tiles(int first, int stop, const Run &run, int most = TILE) {
  for (int row = first, rows; row < stop; row += rows) {
    const int left = (stop - row + most - 1) / most;
    rows = (stop - row + left - 1) / left;
    if (IN_PAIRS) rows = std::min(rows + rows % 2, stop - row);
    run(row, rows);
  }
}

// The last words of rows and of a panel, fewer than 16, padded with zeros.
struct Remainder {
  alignas(64) int32_t x[TILE][LANES];
  Words w[LANES * BLOCKS];

  Remainder(int rows, Rows from, const Words *panel, int count) {
    for (int r = 0; r < rows; ++r) store(x[r], load(from.words + r * from.row, lanes(count)));
    for (int i = 0; i < LANES * BLOCKS; ++i)
      w[i] = i < count * BLOCKS ? load((const int32_t *)(panel + i)) : Words{};
  }
};

constexpr int MAX_TRANSPOSED_WORDS = 96;  // the longest row that `transposed` takes

// Rows that are stored as columns, transposed: [16 words][row][word].
inline Rows transposed(int rows, Rows x, int count) {
  alignas(64) thread_local int32_t to[MAX_TRANSPOSED_WORDS / LANES][TILE][LANES];
  assert(x.row == 1 && count <= MAX_TRANSPOSED_WORDS);
  for (int k = 0; k < count; k += LANES)
    for (int row = 0; row < rows; row += LANES) {
      Words square[LANES];
      for (int i = 0; i < LANES; ++i)
        square[i] = load(x.words + (k + i) * x.place + row, k + i < count ? lanes(rows - row) : 0);
      transpose(square);
      for (int r = 0; r < LANES; ++r) store(to[k / LANES][row + r], square[r]);
    }
  return {to[0][0], LANES, TILE};
}

// Compute the sums in tiles, from 0: add(x, row, w) adds the products of 16 words.
template <typename Add>
inline void add_words(int rows, Rows x, const Words *panel, int count, const Add &add) {
  zero_tile<0>(), zero_tile<1>(), zero_tile<2>(), zero_tile<3>();
  for (; count >= LANES; count -= LANES, x.words += LANES * x.place, panel += LANES * BLOCKS)
    add(x.words, x.row, panel);
  if (!count) return;
  const Remainder rest(rows, x, panel, count);
  add(rest.x[0], LANES, rest.w);
}

// As `register_product`, in tiles.
template <typename Kind, typename Begin, typename End, typename Meanwhile = Nothing>
inline void tile_product(int rows, Rows x, const Words *panel, int count, const Begin &begin,
                         const End &end, const Meanwhile &meanwhile = {}) {
  constexpr size_t WORD = sizeof(int32_t), COLUMNS = BLOCKS * sizeof(Words), SUMS = PANEL * WORD;
  alignas(64) int32_t sums[TILE][PANEL];
  if (x.row == 1) x = transposed(rows, x, count);
  shape_tiles(rows);
  if (rows <= LANES) {
    add_words(rows, x, panel, count, [&](const int32_t *x, size_t row, const Words *w) {
      load_tile<4>(x, row * WORD), load_tile<6>(w, COLUMNS), load_tile<7>(w + 1, COLUMNS);
      meanwhile(LANES / 2);
      load_tile<5>(w + 2, COLUMNS);
      Kind::template add_tiles<0, 4, 6>();
      load_tile<6>(w + 3, COLUMNS);
      meanwhile(LANES / 2);
      Kind::template add_tiles<1, 4, 7>();
      Kind::template add_tiles<2, 4, 5>(), Kind::template add_tiles<3, 4, 6>();
    });
    int32_t *to = sums[0];
    store_tile<0>(to, SUMS), store_tile<1>(to + LANES, SUMS);
    store_tile<2>(to + 2 * LANES, SUMS), store_tile<3>(to + 3 * LANES, SUMS);
  } else {
    for (int half = 0; half < 2; ++half) {
      add_words(rows, x, panel, count, [&](const int32_t *x, size_t row, const Words *w) {
        w += 2 * half;
        load_tile<4>(x, row * WORD), load_tile<6>(w, COLUMNS), load_tile<7>(w + 1, COLUMNS);
        meanwhile(LANES / 2);
        load_tile<5>(x + LANES * row, row * WORD);
        Kind::template add_tiles<0, 4, 6>(), Kind::template add_tiles<1, 4, 7>();
        meanwhile(LANES / 2);
        Kind::template add_tiles<2, 5, 6>(), Kind::template add_tiles<3, 5, 7>();
      });
      int32_t *upper = sums[0] + 2 * half * LANES, *lower = upper + LANES * PANEL;
      store_tile<0>(upper, SUMS), store_tile<1>(upper + LANES, SUMS);
      store_tile<2>(lower, SUMS), store_tile<3>(lower + LANES, SUMS);
    }
  }
  for (int r = 0; r < rows; ++r)
    for (int b = 0; b < BLOCKS; ++b) end(r, b, Kind::plus(begin(r, b), sums[r] + b * LANES));
}

// Up to TILE rows by a panel of `count` words; `tile` explains begin, end and meanwhile.
template <typename Kind, typename Begin, typename End, typename Meanwhile = Nothing>
inline void product(int rows, Rows x, const Words *panel, int count, const Begin &begin,
                    const End &end, const Meanwhile &meanwhile = {}) {
  if constexpr (TILE == IN_REGISTERS) {
    register_product<Kind>(rows, x, panel, count, begin, end, meanwhile);
  } else {
    if constexpr (HAS_TILES && Kind::TILED_FROM > 0)
      if (rows >= Kind::TILED_FROM)
        return tile_product<Kind>(rows, x, panel, count, begin, end, meanwhile);
    const auto run = [&](int first, int height) {
      register_product<Kind>(
          height, {x.words + first * x.row, x.row, x.place}, panel, count,
          [&](int r, int b) { return begin(first + r, b); },
          [&](int r, int b, typename Kind::Sum sum) { end(first + r, b, sum); }, meanwhile);
    };
    in_tiles(0, rows, run, IN_REGISTERS);
  }
}

// The most passes through a panel that products of `rows` rows make.
template <typename Kind>
inline int passes(int rows) {
  if (HAS_TILES && Kind::TILED_FROM > 0 && rows >= Kind::TILED_FROM)
    return (rows + TILE - 1) / TILE * (rows > LANES ? 2 : 1);
  return (rows + IN_REGISTERS - 1) / IN_REGISTERS * (BLOCKS / AT_ONCE);
}

}  // namespace
