// Products of a decoding step with int4 weights: a scale for each 32 inputs of an output.
//
// A row of x becomes int8. The sum over a group of inputs is exact; it is multiplied by the group's
// scale and added to a sum in fp32, group after group: a row's bits depend on that row alone.
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

// What the largest number of a row is 127 of.
inline float int8_scale(const float *row, int size) {
  Floats most = _mm512_set1_ps(1e-12f);
  for (int i = 0; i < size; i += LANES)
    most = _mm512_max_ps(most, _mm512_abs_ps(load(row + i, lanes(size - i))));
  return _mm512_reduce_max_ps(most) / 127.f;
}

// The first numbers of `left` as multiples of a scale; 0 beyond them.
inline Words to_int8(const float *row, int left, float scale) {
  return _mm512_cvtps_epi32(_mm512_div_ps(load(row, lanes(left)), _mm512_set1_ps(scale)));
}

// A row of numbers in groups, the last of which is filled up with zeros. Returns the row's scale.
float to_groups(const float *row, int size, RowGroup *to) {
  const float scale = int8_scale(row, size);
  for (int i = 0; i < size; i += GROUP, ++to) {
    const Words low = to_int8(row + i, size - i, scale);
    const Words high = to_int8(row + i + LANES, size - i - LANES, scale);
    _mm_storeu_si128((__m128i *)to->words, _mm512_cvtepi32_epi8(low));
    _mm_storeu_si128((__m128i *)to->words + 1, _mm512_cvtepi32_epi8(high));
    to->offset = -8 * _mm512_reduce_add_epi32(_mm512_add_epi32(low, high));
  }
  return scale;
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
    for (int r = 0; r < ROWS; ++r)
      totals[r][b] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[r][b]), scale, totals[r][b]);
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

// Up to INT4_TILE rows by a panel, of `count` groups each; totals are without the rows' scales.
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
