// Products of a decoding step with weights in int8, int4 and iq4_nl.
//
// A row of x becomes int8 by groups of inputs, each with a scale, so that an outlier spoils its own
// group. The sum over a group is exact; times the scales it is added to a sum in fp32, group after
// group: a row's bits depend on that row alone. Weights are unsigned, with 128 or 8 added.
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

struct Iq4 {
  static constexpr int added = 128;
  const Words values = _mm512_broadcast_i32x4(
      _mm_setr_epi8(1, 24, 45, 63, 79, 93, 106, 118, (char)129, (char)141, (char)153, (char)166,
                    (char)181, (char)197, (char)217, (char)241));
  Words operator()(Words codes) const { return _mm512_shuffle_epi8(values, codes); }
};

inline int group_count(int inputs, int group) { return (inputs + group - 1) / group; }

// A row of numbers in groups, the last of which is filled up with zeros. added: what makes weights
// unsigned.
template <int INPUTS>
void to_groups(const float *row, int size, int added, RowGroup<INPUTS> *to) {
  for (int left = size; left > 0; left -= INPUTS, row += INPUTS, ++to) {
    Floats most = _mm512_set1_ps(1e-12f);
    for (int i = 0; i < std::min(left, INPUTS); i += LANES)
      most = _mm512_max_ps(most, _mm512_abs_ps(load(row + i, lanes(left - i))));
    to->scale = _mm512_reduce_max_ps(most) / 127.f;
    Words sum = _mm512_setzero_si512();
    for (int i = 0; i < INPUTS; i += LANES) {
      const Floats numbers = i < left ? load(row + i, lanes(left - i)) : _mm512_setzero_ps();
      const Words whole = _mm512_cvtps_epi32(_mm512_div_ps(numbers, _mm512_set1_ps(to->scale)));
      _mm_storeu_si128((__m128i *)(to->words + i / 4), _mm512_cvtepi32_epi8(whole));
      sum = _mm512_add_epi32(sum, whole);
    }
    to->offset = -added * _mm512_reduce_add_epi32(sum);
  }
}

// Up to TILE rows by a panel of `count` words of int8 -> totals.
void int8_product(int rows, const RowGroup<INT8_GROUP> *x, const Words *panel, int count,
                  Floats (*totals)[BLOCKS]) {
  constexpr int words = INT8_GROUP / 4;
  const size_t groups = group_count(count, words);
  for (int r = 0; r < rows; ++r)
    for (int b = 0; b < BLOCKS; ++b) totals[r][b] = _mm512_setzero_ps();
  for (int at = 0; at < count; at += words, ++x) {
    const auto begin = [&](int r, int) { return _mm512_set1_epi32(x[r * groups].offset); };
    const auto end = [&](int r, int b, Words sum) {
      const Floats scale = _mm512_set1_ps(x[r * groups].scale);
      totals[r][b] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, totals[r][b]);
    };
    const size_t row = groups * sizeof *x / sizeof *x->words;
    product<Int8>(rows, {x->words, row, 1}, panel + (size_t)at * BLOCKS,
                  std::min(words, count - at), begin, end);
  }
}

// Add to totals the sums of ROWS rows, `stride` groups apart, by a group of a panel.
template <typename Kind, int ROWS>
inline void add_group(const Kind &weights, const RowGroup<GROUP> *x, size_t stride,
                      const PanelGroup &panel, Floats (*totals)[BLOCKS]) {
  Words sums[ROWS][BLOCKS];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int b = 0; b < BLOCKS; ++b) sums[r][b] = _mm512_set1_epi32(x[r * stride].offset);
#pragma GCC unroll 4
  for (int k = 0; k < HALF_WORDS; ++k) {
    Words both[BLOCKS];
#pragma GCC unroll 4
    for (int b = 0; b < BLOCKS; ++b) both[b] = _mm512_loadu_si512(panel.values[k][b]);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      Words w[BLOCKS];
#pragma GCC unroll 4
      for (int b = 0; b < BLOCKS; ++b)
        w[b] = weights(
            _mm512_and_si512(half ? _mm512_srli_epi16(both[b], 4) : both[b], _mm512_set1_epi8(15)));
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) {
        const Words word = _mm512_set1_epi32(x[r * stride].words[k + half * HALF_WORDS]);
#pragma GCC unroll 4
        for (int b = 0; b < BLOCKS; ++b) sums[r][b] = Int8::add(sums[r][b], word, w[b]);
      }
    }
  }
#pragma GCC unroll 4
  for (int b = 0; b < BLOCKS; ++b) {
    const auto *scales = (const __m256i *)(panel.scales + b * LANES);
    const Floats scale = _mm512_cvtph_ps(_mm256_loadu_si256(scales));
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      const Floats both = _mm512_mul_ps(scale, _mm512_set1_ps(x[r * stride].scale));
      totals[r][b] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[r][b]), both, totals[r][b]);
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
    for (int b = 0; b < BLOCKS; ++b) own[r][b] = _mm512_setzero_ps();
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
