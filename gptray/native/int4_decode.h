// Products of a decoding step with int4 weights: a scale for each 32 inputs of an output.
//
// A row of x becomes int8 by groups of 32 too. The sum over a group is exact; it is multiplied by
// both scales and added to a sum in fp32, group after group: a row's bits depend on that row alone.
//
// Dettmers and Zettlemoyer 2023, The case for 4-bit precision; the form is GGUF's Q4_0.

#pragma once

#include "gemm.h"

namespace {

constexpr int GROUP = 32, GROUP_WORDS = GROUP / 4;
constexpr int INT4_TILE = 4;     // rows at once: 16 sums, 8 weights, a word and a mask in registers
constexpr int GROUPS_AHEAD = 4;  // that memory is asked for

// A group of a row of x.
struct RowGroup {
  int32_t words[GROUP_WORDS];  // int8
  float scale;
  int32_t offset;              // -8 x the sum of the numbers: weights are stored with 8 added
};

// A group of a panel of weights.
struct PanelGroup {
  // Of 16 outputs a word of unsigned numbers in the lower halves of bytes, and in the upper halves
  // the word that comes GROUP_WORDS / 2 later.
  uint8_t values[GROUP_WORDS / 2][BLOCKS][4 * LANES];
  uint16_t scales[PANEL];  // fp16
};

inline int group_count(int inputs) { return (inputs + GROUP - 1) / GROUP; }

// A row of numbers in groups, the last of which is filled up with zeros.
void to_groups(const float *row, int size, RowGroup *to) {
  for (int i = 0; i < size; i += GROUP, ++to) {
    const Floats low = load(row + i, lanes(size - i));
    const Floats high = load(row + i + LANES, lanes(size - i - LANES));
    const Floats most = _mm512_max_ps(_mm512_abs_ps(low), _mm512_abs_ps(high));
    to->scale = _mm512_reduce_max_ps(_mm512_max_ps(most, _mm512_set1_ps(1e-12f))) / 127.f;
    const Floats scale = _mm512_set1_ps(to->scale);
    const Words first = _mm512_cvtps_epi32(_mm512_div_ps(low, scale));
    const Words second = _mm512_cvtps_epi32(_mm512_div_ps(high, scale));
    _mm_storeu_si128((__m128i *)to->words, _mm512_cvtepi32_epi8(first));
    _mm_storeu_si128((__m128i *)to->words + 1, _mm512_cvtepi32_epi8(second));
    to->offset = -8 * _mm512_reduce_add_epi32(_mm512_add_epi32(first, second));
  }
}

// Add to totals the sums of ROWS rows, `stride` groups apart, by a group of a panel.
template <int ROWS>
inline void add_group(const RowGroup *x, size_t stride, const PanelGroup &panel,
                      Floats (*totals)[BLOCKS]) {
  Words sums[ROWS][BLOCKS];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int b = 0; b < BLOCKS; ++b) sums[r][b] = _mm512_set1_epi32(x[r * stride].offset);
#pragma GCC unroll 4
  for (int k = 0; k < GROUP_WORDS / 2; ++k) {
    Words both[BLOCKS];
#pragma GCC unroll 4
    for (int b = 0; b < BLOCKS; ++b) both[b] = _mm512_loadu_si512(panel.values[k][b]);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      Words w[BLOCKS];
#pragma GCC unroll 4
      for (int b = 0; b < BLOCKS; ++b)
        w[b] =
            _mm512_and_si512(half ? _mm512_srli_epi16(both[b], 4) : both[b], _mm512_set1_epi8(15));
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) {
        const Words word = _mm512_set1_epi32(x[r * stride].words[k + half * GROUP_WORDS / 2]);
#pragma GCC unroll 4
        for (int b = 0; b < BLOCKS; ++b) sums[r][b] = Int8::add(sums[r][b], w[b], word);
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

// ROWS rows by a panel, of `count` groups each -> totals.
template <int ROWS>
void grouped_tile(const RowGroup *x, const PanelGroup *panel, int count, Floats (*totals)[BLOCKS]) {
  Floats own[ROWS][BLOCKS];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int b = 0; b < BLOCKS; ++b) own[r][b] = _mm512_setzero_ps();
  for (int g = 0; g < count; ++g) {
    // With one row the processor runs ahead of its own accord.
    if (ROWS > 1) fetch((const char *)(panel + g + GROUPS_AHEAD), sizeof(PanelGroup));
    add_group<ROWS>(x + g, count, panel[g], own);
  }
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int b = 0; b < BLOCKS; ++b) totals[r][b] = own[r][b];
}

// Up to INT4_TILE rows by a panel, of `count` groups each -> totals.
inline void grouped_product(int rows, const RowGroup *x, const PanelGroup *panel, int count,
                            Floats (*totals)[BLOCKS]) {
  switch (rows) {
    case 1: return grouped_tile<1>(x, panel, count, totals);
    case 2: return grouped_tile<2>(x, panel, count, totals);
    case 3: return grouped_tile<3>(x, panel, count, totals);
    default: return grouped_tile<INT4_TILE>(x, panel, count, totals);
  }
}

}  // namespace
