// Linear layers of a decoding step: rows (N, inputs) fp32 -> (N, outputs) fp32.
//
// All threads of a parallel region call `linear` and share its loops.

#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "decode.h"
#include "gelu.h"
#include "gemm.h"
#include "norm.h"

namespace {

inline int word_count(const Linear &linear) {
  const int per_word = linear.kind == INT8 ? 4 : linear.kind == BF16 ? 2 : 1;
  return (linear.inputs + per_word - 1) / per_word;
}

// Words from one row to the next: a row is written 16 words at a time.
inline size_t row_words(const Linear &linear) {
  return (word_count(linear) + LANES - 1) / LANES * LANES;
}

// A row of numbers as words; those beyond it meet weights of 0. Returns the row's scale.
float to_words(const float *row, int size, int kind, int32_t *words) {
  if (kind == FP32) {
    std::memcpy(words, row, size * sizeof(float));
    return 1.f;
  }
  if (kind == BF16) {
    for (int i = 0; i < size; i += LANES)
      store((uint16_t *)words + i, load(row + i, lanes(size - i)), 0xFFFF);
    return 1.f;
  }
  Floats most = _mm512_set1_ps(1e-12f);
  for (int i = 0; i < size; i += LANES)
    most = _mm512_max_ps(most, _mm512_abs_ps(load(row + i, lanes(size - i))));
  const float scale = _mm512_reduce_max_ps(most) / 127.f;
  for (int i = 0; i < size; i += LANES) {
    const Floats scaled = _mm512_div_ps(load(row + i, lanes(size - i)), _mm512_set1_ps(scale));
    // Unsigned, with 128 for zero: the dot product takes unsigned by signed.
    const __m512i whole = _mm512_add_epi32(_mm512_cvtps_epi32(scaled), _mm512_set1_epi32(128));
    _mm_storeu_si128((__m128i *)((uint8_t *)words + i), _mm512_cvtepi32_epi8(whole));
  }
  return scale;
}

// A finished sum as fp32.
template <typename Kind>
inline Floats value(typename Kind::Sum sum, const Linear &, int, __mmask16, float) {
  return sum;
}

template <>
inline Floats value<Int8>(Words sum, const Linear &linear, int column, __mmask16 mask,
                          float scale) {
  const Words zero = _mm512_maskz_loadu_epi32(mask, linear.zero + column);
  const Floats both = _mm512_mul_ps(load(linear.scale + column, mask), _mm512_set1_ps(scale));
  return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(sum, zero)), both);
}

struct Results {
  float *rows;       // (N, stride)
  const float *add;  // (N, stride), or null
  int stride;
  bool gelu;
};

// Rows first .. stop - 1 by one panel.
template <typename Kind>
void multiply_panel(const Linear &linear, int panel, const int32_t *words, const float *scales,
                    const Results &to, int first, int stop) {
  const int count = word_count(linear);
  const size_t width = row_words(linear);
  const Words *weights = (const Words *)linear.weight + (size_t)panel * count * BLOCKS;
  in_tiles(first, stop, [&](int row, int rows) {
    typename Kind::Sum sums[TILE][BLOCKS];  // at rest, lest all that follows be unrolled
    product<Kind>(rows, {words + row * width, width, 1}, weights, count, FromZero<Kind>{},
                  [&](int r, int b, typename Kind::Sum sum) { sums[r][b] = sum; });
    for (int r = 0; r < rows; ++r)
      for (int b = 0; b < BLOCKS; ++b) {
        const int column = panel * PANEL + b * LANES;
        if (column >= linear.outputs) continue;
        const __mmask16 mask = lanes(linear.outputs - column);
        const size_t at = (size_t)(row + r) * to.stride + column;
        Floats y = value<Kind>(sums[r][b], linear, column, mask, scales[row + r]);
        if (linear.bias) y = _mm512_add_ps(y, load(linear.bias + column, mask));
        if (to.gelu) y = gelu(y);
        if (to.add) y = _mm512_add_ps(y, load(to.add + at, mask));
        store(to.rows + at, y, mask);
      }
  });
}

void multiply(const Linear &linear, const Step &step, int rows, const Results &to) {
  // Cores are seldom equally fast: others' work and other machines' take from each in turn.
#pragma omp for collapse(2) schedule(dynamic)
  for (int first = 0; first < rows; first += ROW_BLOCK)
    for (int panel = 0; panel < panel_count(linear.outputs); ++panel) {
      const int stop = std::min(first + ROW_BLOCK, rows);
      const auto run = linear.kind == INT8   ? multiply_panel<Int8>
                       : linear.kind == BF16 ? multiply_panel<Bf16>
                                             : multiply_panel<Fp32>;
      run(linear, panel, step.words, step.scales, to, first, stop);
    }
}

// x (N, inputs), or the rows of it that `chosen` names, through `norm` if there is one.
void linear(const Linear &linear, const Step &step, const float *x, const Norm *norm,
            const int32_t *chosen, int rows, const Results &to) {
#pragma omp for schedule(static)
  for (int row = 0; row < rows; ++row) {
    const float *from = x + (size_t)(chosen ? chosen[row] : row) * linear.inputs;
    thread_local std::vector<float> normed;
    if (norm && norm->weight) {
      normed.resize(linear.inputs);
      normalise(from, norm->weight, norm->bias, normed.data(), norm->eps, linear.inputs);
      from = normed.data();
    }
    int32_t *words = step.words + row * row_words(linear);
    step.scales[row] = to_words(from, linear.inputs, linear.kind, words);
  }
  multiply(linear, step, rows, to);
}

}  // namespace
