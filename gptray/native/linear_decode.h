// Linear layers of a decoding step: rows (N, inputs) fp32 -> (N, outputs) fp32.
//
// All threads of a parallel region call `linear` and share its loops.

#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "activation_decode.h"
#include "decode.h"
#include "gemm.h"
#include "low_rank_decode.h"
#include "norm.h"

namespace {

// Up to so many rows each thread reads for itself: that takes less than to wait for another.
constexpr int OWN_ROWS = 4;

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

// 16 outputs from a column on: how their sums become numbers.
template <typename Kind>
struct Outputs {
  __mmask16 mask;
  bool has_bias;
  Floats bias, scale;
  Words zero;

  Outputs(const Linear &linear, int column)
      : mask(lanes(linear.outputs - column)), has_bias(linear.bias) {
    if (has_bias) bias = load(linear.bias + column, mask);
    if (linear.kind != INT8) return;
    scale = load(linear.scale + column, mask);
    zero = _mm512_maskz_loadu_epi32(mask, linear.zero + column);
  }

  // row_scale: of the row's words.
  Floats operator()(typename Kind::Sum sum, float row_scale) const {
    const Floats y = number(sum, row_scale);
    return has_bias ? _mm512_add_ps(y, bias) : y;
  }

 private:
  Floats number(Floats sum, float) const { return sum; }

  Floats number(Words sum, float row_scale) const {
    const Floats both = _mm512_mul_ps(scale, _mm512_set1_ps(row_scale));
    return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(sum, zero)), both);
  }
};

struct Results {
  float *rows;       // (N, stride)
  const float *add;  // (N, stride), or null
  int stride;
  int activation = NONE;
};

struct Input {  // rows as words, their scales, and what adapters add to their products
  const int32_t *words;
  const float *scales;
  Added added;
};

// The sums of a tile's rows by one panel -> results from `row` on.
template <typename Kind>
inline void finish(const typename Kind::Sum (*sums)[BLOCKS], const Linear &linear, int panel,
                   const Input &x, const Results &to, int first, int rows) {
  const bool is_gated = to.activation == SWIGLU;
  const int blocks = is_gated ? BLOCKS / 2 : BLOCKS, end = is_gated ? to.stride : linear.outputs;
  for (int b = 0; b < blocks; ++b) {
    const int from = panel * PANEL + b * LANES, column = (panel * blocks + b) * LANES;
    if (column >= end) break;
    const __mmask16 mask = lanes(end - column);
    const Outputs<Kind> outputs(linear, from);
    const int let_through = is_gated ? from + PANEL / 2 : from;
    const Outputs<Kind> gated(linear, let_through);
    for (int r = 0; r < rows; ++r) {
      const int row = first + r;
      const size_t at = (size_t)row * to.stride + column;
      Floats y = expand(x.added, row, from, outputs(sums[r][b], x.scales[row]));
      if (is_gated) {
        const Floats inner = gated(sums[r][b + BLOCKS / 2], x.scales[row]);
        y = _mm512_mul_ps(silu(y), expand(x.added, row, let_through, inner));
      } else {
        y = activate(to.activation, y);
      }
      if (to.add) y = _mm512_add_ps(y, load(to.add + at, mask));
      store(to.rows + at, y, mask);
    }
  }
}

// Rows first .. stop - 1 by one panel.
template <typename Kind>
void multiply_panel(const Linear &linear, int panel, const Input &x, const Results &to, int first,
                    int stop) {
  const int count = word_count(linear);
  const size_t width = row_words(linear);
  const Words *weights = (const Words *)linear.weight + (size_t)panel * count * BLOCKS;
  in_tiles(first, stop, [&](int row, int rows) {
    fetch(x.added, panel, panel_count(linear.outputs), row, row + rows);
    typename Kind::Sum sums[TILE][BLOCKS];  // at rest, lest all that follows be unrolled
    product<Kind>(rows, {x.words + row * width, width, 1}, weights, count, FromZero<Kind>{},
                  [&](int r, int b, typename Kind::Sum sum) { sums[r][b] = sum; });
    finish<Kind>(sums, linear, panel, x, to, row, rows);
  });
}

void multiply(const Linear &linear, const Input &x, int rows, const Results &to) {
  // Cores are seldom equally fast: others' work and other machines' take from each in turn.
#pragma omp for collapse(2) schedule(dynamic)
  for (int first = 0; first < rows; first += ROW_BLOCK)
    for (int panel = 0; panel < panel_count(linear.outputs); ++panel) {
      const int stop = std::min(first + ROW_BLOCK, rows);
      const auto run = linear.kind == INT8   ? multiply_panel<Int8>
                       : linear.kind == BF16 ? multiply_panel<Bf16>
                                             : multiply_panel<Fp32>;
      run(linear, panel, x, to, first, stop);
    }
}

// x (N, inputs), or the rows of it that `chosen` names, through `norm` if there is one.
void linear(const Linear &linear, const Step &step, const float *x, const Norm *norm,
            const int32_t *chosen, int rows, const Results &to) {
  Added added{step.adapters, linear.number, step.narrow, step.most_rank};
  const auto read = [&](int row, int32_t *words) {
    const float *from = x + (size_t)(chosen ? chosen[row] : row) * linear.inputs;
    thread_local std::vector<float> normed;
    if (norm && norm->weight) {
      normed.resize(linear.inputs);
      normalise(from, norm->weight, norm->bias, normed.data(), norm->eps, linear.inputs);
      from = normed.data();
    }
    shrink(added, row, from, linear.inputs);
    return to_words(from, linear.inputs, linear.kind, words + row * row_words(linear));
  };
  if (rows <= OWN_ROWS) {
    thread_local std::vector<int32_t> words;
    words.resize(std::max(words.size(), rows * row_words(linear)));
    thread_local std::vector<float> narrow;
    narrow.resize(std::max<size_t>(narrow.size(), rows * added.stride));
    added.narrow = narrow.data();
    float scales[OWN_ROWS];
    for (int row = 0; row < rows; ++row) scales[row] = read(row, words.data());
    multiply(linear, {words.data(), scales, added}, rows, to);
  } else {
#pragma omp for schedule(static)
    for (int row = 0; row < rows; ++row) step.scales[row] = read(row, step.words);
    multiply(linear, {step.words, step.scales, added}, rows, to);
  }
}

}  // namespace
