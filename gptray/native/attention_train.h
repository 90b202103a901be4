// Causal attention of one head: T tokens, queries, keys and values of D <= 64 numbers each.
// Probabilities are never kept: the backward pass recomputes them, a few queries at a time.

#pragma once

#include <cmath>
#include <cstring>

#include "exp.h"
#include "panels.h"

namespace {

// Queries whose gradients are summed at once. No tile of them but the last ends where a panel of
// keys does, so that all words that are read were written.
constexpr int QUERIES = 192;
static_assert(QUERIES % TILE == 0 && QUERIES % PANEL == 0);

// One head of a sequence: T rows of D numbers each.
struct Head {
  const uint16_t *q, *k, *v;
  size_t stride;  // from row to row
  int T, D;
  float scale() const { return 1.f / std::sqrt((float)D); }
  size_t row_panels() const { return (size_t)panel_count(T) * D / 2 * BLOCKS; }
  size_t column_panel() const { return (size_t)(T + 1) / 2 * BLOCKS; }
  // From row to row of scores: no power of 2, lest all rows be kept in few places of the cache.
  size_t width() const { return (size_t)panel_count(T) * PANEL + LANES; }
};

// T rows of D numbers -> panels of 64 rows, words along D.
void pack_head_rows(const uint16_t *x, size_t stride, Words *panels, int T, int D) {
  for (int block = 0; block < panel_count(T) * BLOCKS; ++block)
    pack_block(
        [&](int r, int k) {
          const int row = block * LANES + r;
          return _mm512_maskz_loadu_epi32(row < T ? lanes(D / 2 - k) : 0, x + row * stride + 2 * k);
        },
        panels, block, D / 2);
}

Rows words_of(const uint16_t *rows, size_t stride) {
  return {(const int32_t *)rows, stride / 2, 1};
}

// Write sums of a tile times a factor each row as rows of D numbers.
struct ToRows {
  uint16_t *rows;
  size_t stride;
  int D;
  const float *factors;
  void operator()(int r, int b, Floats sum) const {
    const __mmask16 mask = lanes(D - b * LANES);
    sum = _mm512_mul_ps(sum, _mm512_set1_ps(factors[r]));
    if (mask) store(rows + r * stride + b * LANES, sum, mask);
  }
};

// 2^(scale score - top) of one query's scores (count) in bf16, zeros after them up to a multiple
// of 16. Returns their sum.
float exponentials(const float *scores, int count, float scale, float top, uint16_t *out) {
  Floats total = _mm512_setzero_ps();
  for (int k = 0; k < count; k += LANES) {
    const Floats score = load(scores + k, 0xFFFF);
    Floats e = exp2(_mm512_fmsub_ps(score, _mm512_set1_ps(scale), _mm512_set1_ps(top)));
    e = _mm512_maskz_mov_ps(lanes(count - k), e);
    total = _mm512_add_ps(total, e);
    store(out + k, e, 0xFFFF);
  }
  return _mm512_reduce_add_ps(total);
}

// out: rows of D, `stride` apart; log_sums (T): binary logarithms of each query's exponentials
void attend(const Head &head, uint16_t *out, size_t stride, float *log_sums) {
  const int T = head.T, D = head.D;
  const size_t width = head.width();
  thread_local std::vector<Line> packed;
  thread_local std::vector<float> all_scores;
  thread_local std::vector<uint16_t> all_powers;
  Words *keys = (Words *)room(packed, head.row_panels() + head.column_panel());
  Words *values = keys + head.row_panels();
  float *scores = room(all_scores, TILE * width);     // (TILE, width)
  uint16_t *powers = room(all_powers, TILE * width);  // (TILE, width)
  const float scale = head.scale() * LOG2_E;
  pack_head_rows(head.k, head.stride, keys, T, D);
  pack_panel(head.v, head.stride, values, T, D);
  in_tiles(0, T, [&](int t, int rows) {
    const Rows queries = words_of(head.q + t * head.stride, head.stride);
    Floats most[TILE];
    std::fill(most, most + rows, _mm512_set1_ps(-INFINITY));
    for (int k = 0; k < t + rows; k += PANEL)
      product<Bf16>(rows, queries, keys + (size_t)(k / PANEL) * D / 2 * BLOCKS, D / 2,
                    FromZero<Bf16>{}, [&](int r, int b, Floats sum) {
                      const int column = k + b * LANES;
                      store(scores + r * width + column, sum, 0xFFFF);
                      most[r] =
                          _mm512_mask_max_ps(most[r], lanes(t + r + 1 - column), most[r], sum);
                    });
    const int words = (t + rows + 1) / 2;
    float factors[TILE];
    for (int r = 0; r < rows; ++r) factors[r] = scale * _mm512_reduce_max_ps(most[r]);
    for (int r = 0; r < rows; ++r) {
      uint16_t *row = powers + r * width;
      std::fill(row + t + r + 1, row + 2 * words, 0);
      const float top = factors[r];
      const float sum = exponentials(scores + r * width, t + r + 1, scale, top, row);
      log_sums[t + r] = top + std::log2(sum);
      factors[r] = 1 / sum;
    }
    product<Bf16>(rows, words_of(powers, width), values, words, FromZero<Bf16>{},
                  ToRows{out + t * stride, stride, D, factors});
  });
}

// What the gradients of a head are made from, and of QUERIES queries at a time.
struct Backward {
  Head head;
  const uint16_t *out, *grad;  // (T, D), rows `stride` apart
  size_t stride;
  const float *log_sums;                                  // (T)
  Words *key_rows, *value_rows, *keys, *queries, *grads;  // packed
  // Probabilities and the gradients of scaled scores: words along the queries, (QUERIES / 2,
  // width).
  int32_t *p_words, *s_words;
  uint16_t *s_rows;              // (TILE, width)
  float *key_grad, *value_grad;  // (T, 64)
};

// Probabilities and the gradients of the scaled scores of queries t .. t + rows - 1, to all their
// keys.
void score_gradients(const Backward &w, int t, int rows, int32_t *p_words, int32_t *s_words) {
  const Head &head = w.head;
  const size_t width = head.width();
  const Floats scale = _mm512_set1_ps(head.scale() * LOG2_E);
  Floats delta[TILE], base[TILE];  // delta: the sum of out * grad
  for (int r = 0; r < rows; ++r) {
    Floats sum = _mm512_setzero_ps();
    for (int d = 0; d < head.D; d += LANES) {
      const __mmask16 mask = lanes(head.D - d);
      const size_t at = (t + r) * w.stride + d;
      sum = _mm512_fmadd_ps(load(w.out + at, mask), load(w.grad + at, mask), sum);
    }
    delta[r] = _mm512_set1_ps(_mm512_reduce_add_ps(sum));
    base[r] = _mm512_set1_ps(w.log_sums[t + r]);
  }
  for (int k = 0; k < t + rows; k += PANEL) {
    Floats scores[TILE][BLOCKS], grads[TILE][BLOCKS];
    const size_t panel = (size_t)(k / PANEL) * head.D / 2 * BLOCKS;
    product<Bf16>(rows, words_of(head.q + t * head.stride, head.stride), w.key_rows + panel,
                  head.D / 2, FromZero<Bf16>{},
                  [&](int r, int b, Floats sum) { scores[r][b] = sum; });
    product<Bf16>(rows, words_of(w.grad + t * w.stride, w.stride), w.value_rows + panel, head.D / 2,
                  FromZero<Bf16>{}, [&](int r, int b, Floats sum) { grads[r][b] = sum; });
    for (int b = 0; b < BLOCKS; ++b) {
      const int column = k + b * LANES;
      for (int r = 0; r < rows; r += 2) {
        Floats p[2], s[2];
        for (int o = 0; o < 2; ++o) {
          const __mmask16 mask = r + o < rows ? lanes(t + r + o + 1 - column) : 0;
          p[o] = s[o] = _mm512_setzero_ps();
          if (!mask) continue;
          p[o] = exp2(_mm512_fmsub_ps(scores[r + o][b], scale, base[r + o]));
          p[o] = _mm512_maskz_mov_ps(mask, p[o]);
          s[o] = _mm512_mul_ps(p[o], _mm512_sub_ps(grads[r + o][b], delta[r + o]));
        }
        const size_t at = r / 2 * width + column;
        _mm512_storeu_si512(p_words + at, pair(p[0], p[1]));
        _mm512_storeu_si512(s_words + at, pair(s[0], s[1]));
        for (int o = 0; o < 2 && r + o < rows; ++o)
          store(w.s_rows + (r + o) * width + column, s[o], 0xFFFF);
      }
    }
  }
}

// Add what queries first .. last - 1 bring to the gradients of keys and values.
void add_to_keys(const Backward &w, int first, int last) {
  const size_t width = w.head.width();
  in_tiles(0, last, [&](int k, int rows) {
    const int skip = std::max(k - first, 0) / 2;  // queries before these keys
    const int words = (last - first + 1) / 2 - skip;
    const size_t at = skip * width + k, panel = (size_t)(first / 2 + skip) * BLOCKS;
    for (const bool is_key : {true, false}) {
      float *to = (is_key ? w.key_grad : w.value_grad) + k * PANEL;
      const Rows rows_of = {(is_key ? w.s_words : w.p_words) + at, 1, width};
      product<Bf16>(
          rows, rows_of, (is_key ? w.queries : w.grads) + panel, words,
          [&](int r, int b) { return load(to + r * PANEL + b * LANES, 0xFFFF); },
          [&](int r, int b, Floats sum) { store(to + r * PANEL + b * LANES, sum, 0xFFFF); });
    }
  });
}

// Gradients of a head's q, k and v, rows as far apart as theirs.
void attend_backward(Backward w, uint16_t *dq, uint16_t *dk, uint16_t *dv) {
  const Head &head = w.head;
  const int T = head.T, D = head.D;
  const size_t width = head.width(), words = QUERIES / 2 * width;
  float scales[TILE], ones[TILE];
  std::fill(scales, scales + TILE, head.scale()), std::fill(ones, ones + TILE, 1.f);
  thread_local std::vector<Line> packed;
  thread_local std::vector<int32_t> all_words;
  thread_local std::vector<uint16_t> all_rows;
  thread_local std::vector<float> all_grads;
  w.key_rows = (Words *)room(packed, 2 * head.row_panels() + 3 * head.column_panel());
  w.value_rows = w.key_rows + head.row_panels();
  w.keys = w.value_rows + head.row_panels();
  w.queries = w.keys + head.column_panel();
  w.grads = w.queries + head.column_panel();
  w.p_words = room(all_words, 2 * words);
  w.s_words = w.p_words + words;
  w.s_rows = room(all_rows, TILE * width);
  w.key_grad = room(all_grads, 2 * width * PANEL);
  w.value_grad = w.key_grad + width * PANEL;
  std::memset(w.key_grad, 0, 2 * width * PANEL * sizeof(float));
  pack_head_rows(head.k, head.stride, w.key_rows, T, D);
  pack_head_rows(head.v, head.stride, w.value_rows, T, D);
  pack_panel(head.k, head.stride, w.keys, T, D);
  pack_panel(head.q, head.stride, w.queries, T, D);
  pack_panel(w.grad, w.stride, w.grads, T, D);
  for (int first = 0; first < T; first += QUERIES) {
    const int last = std::min(first + QUERIES, T);
    for (int t = first; t < last; t += TILE) {
      const int rows = std::min(TILE, last - t);
      const size_t at = (t - first) / 2 * width;
      score_gradients(w, t, rows, w.p_words + at, w.s_words + at);
      product<Bf16>(rows, words_of(w.s_rows, width), w.keys, (t + rows + 1) / 2, FromZero<Bf16>{},
                    ToRows{dq + t * head.stride, head.stride, D, scales});
    }
    add_to_keys(w, first, last);
  }
  for (int t = 0; t < T; ++t)
    for (int b = 0; b < BLOCKS; ++b) {
      const size_t from = t * PANEL + b * LANES, to = t * head.stride;
      ToRows{dk + to, head.stride, D, scales}(0, b, load(w.key_grad + from, 0xFFFF));
      ToRows{dv + to, head.stride, D, ones}(0, b, load(w.value_grad + from, 0xFFFF));
    }
}

}  // namespace
