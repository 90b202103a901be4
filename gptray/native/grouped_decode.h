// Products of a decoding step with weights in int8, int4 and iq4_nl.
//
// A row of x becomes int8 by groups of inputs, each with a scale, so that an outlier spoils its own
// group. The sum over a group is exact; times the scales it is added to a sum in fp32, group after
// group: a row's bits depend on that row alone. Weights have 128 or 8 added, and are multiplied
// with BYTE_BIAS or 8 added.
//
// Dettmers et al. 2022, LLM.int8(); weights of 4 bits have the forms of GGUF's Q4_0 and IQ4_NL.

#pragma once

#include <algorithm>

#include "gemm.h"

namespace {

constexpr int INT8_GROUP = 128;  // inputs of a group of x that meets int8 weights
constexpr int GROUP = 32;        // inputs that share a scale of x and of weights of 4 bits
constexpr int INT4_TILE = 4;     // rows at once: 16 sums, 8 weights, a word and a mask
constexpr int GROUPS_AHEAD = 4;  // that are prefetched
constexpr int HALF_WORDS = GROUP / 4 / 2;  // of a group of 4 bits

// A group of a row of x.
template <int INPUTS>
struct RowGroup {
  int32_t words[INPUTS / 4];  // int8
  float scale;
  int32_t offset;  // takes away what `added` in the weights adds to the sum
};

// A group of a panel of weights of 4 bits.
struct PanelGroup {
  // Of 16 outputs a word of numbers in the lower halves of bytes, and in the upper halves the word
  // that comes HALF_WORDS later.
  uint8_t values[HALF_WORDS][BLOCKS][4 * LANES];
  uint16_t scales[PANEL];  // fp16
};

// How a byte's lower half, a code, becomes an unsigned weight.
struct Int4 {
  static constexpr int added = 8;
  Words operator()(Words codes) const { return codes; }
};

constexpr int8_t biased(int weight) { return (int8_t)(weight + BYTE_BIAS); }

constexpr int8_t IQ4_WEIGHTS[16] = {biased(-127), biased(-104), biased(-83), biased(-65),
                                    biased(-49),  biased(-35),  biased(-22), biased(-10),
                                    biased(1),    biased(13),   biased(25),  biased(38),
                                    biased(53),   biased(69),   biased(89),  biased(113)};

struct Iq4 {
  static constexpr int added = BYTE_BIAS;
  const Table weights = table_of(IQ4_WEIGHTS);
  Words operator()(Words codes) const { return look_up(weights, codes); }
};

inline int group_count(int inputs, int group) { return (inputs + group - 1) / group; }

// A row of numbers in groups, the last of which is filled up with zeros. added: what makes weights
// unsigned.
template <int INPUTS>
void to_groups(const float *row, int size, int added, RowGroup<INPUTS> *to) {
  for (int left = size; left > 0; left -= INPUTS, row += INPUTS, ++to) {
    Floats most = all(1e-12f);
    for (int i = 0; i < std::min(left, INPUTS); i += LANES)
      most = max(most, abs(load(row + i, lanes(left - i))));
    to->scale = reduce_max(most) / 127.f;
    Words sum = {};
    for (int i = 0; i < INPUTS; i += LANES) {
      const Floats numbers = i < left ? load(row + i, lanes(left - i)) : Floats{};
      const Words whole = to_int(numbers / all(to->scale));
      store_bytes(to->words + i / 4, whole);
      sum = add(sum, whole);
    }
    to->offset = -added * reduce_add(sum);
  }
}

// Up to TILE rows by a panel of `count` words of int8 -> totals; see `tile` for meanwhile.
template <typename Meanwhile = Nothing>
void int8_product(int rows, const RowGroup<INT8_GROUP> *x, const Words *panel, int count,
                  Floats (*totals)[BLOCKS], const Meanwhile &meanwhile = {}) {
  constexpr int words = INT8_GROUP / 4;
  const size_t groups = group_count(count, words);
  for (int r = 0; r < rows; ++r)
    for (int b = 0; b < BLOCKS; ++b) totals[r][b] = Floats{};
  for (int at = 0; at < count; at += words, ++x) {
    const auto begin = [&](int r, int) { return all(x[r * groups].offset); };
    const auto end = [&](int r, int b, Words sum) {
      const Floats scale = all(x[r * groups].scale);
      totals[r][b] = fmadd(to_float(sum), scale, totals[r][b]);
    };
    const size_t row = groups * sizeof *x / sizeof *x->words;
    product<Int8>(rows, {x->words, row, 1}, panel + (size_t)at * BLOCKS,
                  std::min(words, count - at), begin, end, meanwhile);
  }
}

// Add to totals the sums of ROWS rows, `stride` groups apart, by a group of a panel.
template <typename Kind, int ROWS>
inline void add_group(const Kind &weights, const RowGroup<GROUP> *x, size_t stride,
                      const PanelGroup &panel, Floats (*totals)[BLOCKS]) {
  for (int first = 0; first < BLOCKS; first += AT_ONCE) {
    Words sums[ROWS][AT_ONCE];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
      for (int b = 0; b < AT_ONCE; ++b) sums[r][b] = all(x[r * stride].offset);
#pragma GCC unroll 4
    for (int k = 0; k < HALF_WORDS; ++k) {
      Words both[AT_ONCE];
#pragma GCC unroll 4
      for (int b = 0; b < AT_ONCE; ++b) both[b] = load((const int32_t *)panel.values[k][first + b]);
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        Words w[AT_ONCE];
#pragma GCC unroll 4
        for (int b = 0; b < AT_ONCE; ++b)
          w[b] = weights(half ? high_nibbles(both[b]) : low_nibbles(both[b]));
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) {
          const Words word = all(x[r * stride].words[k + half * HALF_WORDS]);
#pragma GCC unroll 4
          for (int b = 0; b < AT_ONCE; ++b) sums[r][b] = dot_bytes(sums[r][b], word, w[b]);
        }
      }
    }
#pragma GCC unroll 4
    for (int b = 0; b < AT_ONCE; ++b) {
      const Floats scale = load_fp16(panel.scales + (first + b) * LANES);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) {
        Floats &total = totals[r][first + b];
        total = fmadd(to_float(sums[r][b]), scale * all(x[r * stride].scale), total);
      }
    }
  }
}

// ROWS rows by a panel of 4 bits, of `count` groups each -> totals.
template <typename Kind, int ROWS>
void tile_of_groups(const RowGroup<GROUP> *x, const PanelGroup *panel, int count,
                    Floats (*totals)[BLOCKS]) {
  const Kind weights;
  Floats own[ROWS][BLOCKS];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int b = 0; b < BLOCKS; ++b) own[r][b] = Floats{};
  for (int g = 0; g < count; ++g) {
    // With one row the processor runs ahead of its own accord.
    if (ROWS > 1) fetch((const char *)(panel + g + GROUPS_AHEAD), sizeof(PanelGroup));
    add_group<Kind, ROWS>(weights, x + g, count, panel[g], own);
  }
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int b = 0; b < BLOCKS; ++b) totals[r][b] = own[r][b];
}

// Up to INT4_TILE rows by a panel of 4 bits, of `count` groups each -> totals.
template <typename Kind>
inline void grouped_product(int rows, const RowGroup<GROUP> *x, const PanelGroup *panel, int count,
                            Floats (*totals)[BLOCKS]) {
  switch (rows) {
    case 1: return tile_of_groups<Kind, 1>(x, panel, count, totals);
    case 2: return tile_of_groups<Kind, 2>(x, panel, count, totals);
    case 3: return tile_of_groups<Kind, 3>(x, panel, count, totals);
    default: return tile_of_groups<Kind, INT4_TILE>(x, panel, count, totals);
  }
}

}  // namespace
