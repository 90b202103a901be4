// Products of a decoding step by weights in int8, int4 and iq4_nl.
//
// A row of x is quantized to int8 by groups of inputs, each with a scale, so that an outlier spoils
// only its own group. The sum over a group is exact; times its scales, it is added to an fp32 sum,
// group after group, so a row's bits depend on that row alone. Packed weights have 128 or 8 added,
// and are multiplied with BYTE_BIAS or 8 added.
//
// Dettmers et al. 2022, LLM.int8(); 4-bit weights are GGUF's Q4_0 and IQ4_NL.

#pragma once

#include <algorithm>

#include "gemm.h"

namespace {

constexpr int INT8_GROUP = 128;            // inputs of x that share a scale, for int8 weights
constexpr int GROUP = 32;                  // inputs that share a scale in x and in 4-bit weights
constexpr int INT4_TILE = 4;               // rows at once: 16 sums, 8 weights, a word and a mask
constexpr int GROUPS_AHEAD = 4;            // to prefetch
constexpr int HALF_WORDS = GROUP / 4 / 2;  // of a 4-bit group

// A group of x's inputs in one row.
template <int INPUTS>
struct RowGroup {
  int32_t words[INPUTS / 4];  // int8
  float scale;
  int32_t offset;  // cancels the contribution of the weights' `added` to the sum
};

// A group of inputs in a panel of 4-bit weights.
struct PanelGroup {
  // For 16 outputs, a word in the bytes' lower halves, and the word HALF_WORDS later in the upper.
  uint8_t values[HALF_WORDS][BLOCKS][4 * LANES];
  uint16_t scales[PANEL];  // fp16
};

// Turns codes (a byte's lower half) into unsigned weights.
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

// Quantize a row in groups, the last one padded with zeros. added: the weights' offset.
template <int INPUTS>
void to_groups(const float *row, int size, int added, RowGroup<INPUTS> *to) {
  for (int left = size; left > 0; left -= INPUTS, row += INPUTS, ++to) {
    Floats most = splat(1e-12f);
    for (int i = 0; i < std::min(left, INPUTS); i += LANES)
      most = max(most, abs(load(row + i, lanes(left - i))));
    to->scale = reduce_max(most) / 127.f;
    Words sum = {};
    for (int i = 0; i < INPUTS; i += LANES) {
      const Floats numbers = i < left ? load(row + i, lanes(left - i)) : Floats{};
      const Words whole = to_int(numbers / splat(to->scale));
      store_bytes(to->words + i / 4, whole);
      sum = add(sum, whole);
    }
    to->offset = -added * reduce_add(sum);
  }
}

// Up to TILE rows by a panel of `count` int8 words -> totals; `tile` explains meanwhile.
template <typename Meanwhile = Nothing>
void int8_product(int rows, const RowGroup<INT8_GROUP> *x, const Words *panel, int count,
                  Floats (*totals)[BLOCKS], const Meanwhile &meanwhile = {}) {
  constexpr int words = INT8_GROUP / 4;
  const size_t groups = group_count(count, words);
  for (int r = 0; r < rows; ++r)
    for (int b = 0; b < BLOCKS; ++b) totals[r][b] = Floats{};
  for (int at = 0; at < count; at += words, ++x) {
    const auto begin = [&](int r, int) { return splat(x[r * groups].offset); };
    const auto end = [&](int r, int b, Words sum) {
      const Floats scale = splat(x[r * groups].scale);
      totals[r][b] = fmadd(to_float(sum), scale, totals[r][b]);
    };
    const size_t row = groups * sizeof *x / sizeof *x->words;
    product<Int8>(rows, {x->words, row, 1}, panel + (size_t)at * BLOCKS,
                  std::min(words, count - at), begin, end, meanwhile);
  }
}

// Add the sums of ROWS rows, `stride` groups apart, by one group of a panel to totals.
template <typename Kind, int ROWS>
inline void add_group(const Kind &weights, const RowGroup<GROUP> *x, size_t stride,
                      const PanelGroup &panel, Floats (*totals)[BLOCKS]) {
  for (int first = 0; first < BLOCKS; first += AT_ONCE) {
    Words sums[ROWS][AT_ONCE];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
      for (int b = 0; b < AT_ONCE; ++b) sums[r][b] = splat(x[r * stride].offset);
    // Two or more rows are worth zipping the weights' words into pairs.
    constexpr bool in_pairs = IN_PAIRS && ROWS > 1;
    if constexpr (in_pairs)
      add_pairs(sums, ROWS, HALF_WORDS, x->words, stride * sizeof *x / sizeof *x->words, 2,
                [&](int pair, int half) {
                  const auto word = [&](int k) {
                    return load((const int32_t *)panel.values[k][first]);
                  };
                  Words left = word(pair % 2 * 2), right = word(pair % 2 * 2 + 1);
                  zip(left, right);
                  const Words both = half ? right : left;
                  return weights(pair < 2 ? low_nibbles(both) : high_nibbles(both));
                });
#pragma GCC unroll 4
    for (int k = in_pairs ? HALF_WORDS : 0; k < HALF_WORDS; ++k) {
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
          const Words word = splat(x[r * stride].words[k + half * HALF_WORDS]);
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
        total = fmadd(to_float(sums[r][b]), scale * splat(x[r * stride].scale), total);
      }
    }
  }
}

// ROWS rows by a 4-bit panel, of `count` groups each -> totals.
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
    // With one row the processor runs far enough ahead by itself.
    if (ROWS > 1) prefetch((const char *)(panel + g + GROUPS_AHEAD), sizeof(PanelGroup));
    add_group<Kind, ROWS>(weights, x + g, count, panel[g], own);
  }
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int b = 0; b < BLOCKS; ++b) totals[r][b] = own[r][b];
}

// Up to INT4_TILE rows by a 4-bit panel, of `count` groups each -> totals.
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
