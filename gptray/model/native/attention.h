// Causal attention of one head: T tokens, queries, keys and values of D <= 64 numbers each.
// Probabilities are never kept: the way back makes them again, a few queries at a time.

#pragma once

#include <cstring>
#include <vector>

#include "words.h"

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
  size_t width() const { return (size_t)panel_count(T) * PANEL; }
};

// T rows of D numbers -> panels of 64 rows, words along D.
void pack_head_rows(const uint16_t *x, size_t stride, Words *panels, int T, int D) {
  const Words row = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const Words index = _mm512_mullo_epi32(row, _mm512_set1_epi32(2 * stride));  // in bytes
  for (int block = 0; block < panel_count(T) * BLOCKS; ++block) {
    const __mmask16 mask = lanes(T - block * LANES);
    const int32_t *from = (const int32_t *)(x + (size_t)block * LANES * stride);
    Words *to = panels + (size_t)(block / BLOCKS) * D / 2 * BLOCKS + block % BLOCKS;
    for (int k = 0; k < D / 2; ++k, to += BLOCKS)
      *to = _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), mask, index, from + k, 1);
  }
}

Rows words_of(const uint16_t *rows, size_t stride) {
  return {(const int32_t *)rows, stride / 2, 1};
}

// Scores of one query (count) -> probabilities in bf16, zeros after them up to an even number.
// Returns the binary logarithm of the sum of their exponentials.
float softmax(float *scores, int count, float scale, uint16_t *out) {
  Floats most = _mm512_set1_ps(-INFINITY), total = _mm512_setzero_ps();
  for (int k = 0; k < count; k += LANES) {
    const __mmask16 mask = lanes(count - k);
    most = _mm512_mask_max_ps(most, mask, most, load(scores + k, mask));
  }
  const float scale_2 = scale * LOG2_E, top = _mm512_reduce_max_ps(most) * scale_2;
  for (int k = 0; k < count; k += LANES) {
    const __mmask16 mask = lanes(count - k);
    const Floats score = load(scores + k, mask);
    const Floats e = exp2(_mm512_fmsub_ps(score, _mm512_set1_ps(scale_2), _mm512_set1_ps(top)));
    total = _mm512_mask_add_ps(total, mask, total, e);
    store(scores + k, e, mask);
  }
  const float sum = _mm512_reduce_add_ps(total);
  for (int k = 0; k < (count + 1) / 2 * 2; k += LANES) {
    const Floats e = load(scores + k, lanes(count - k));
    store(out + k, _mm512_mul_ps(e, _mm512_set1_ps(1.f / sum)), 0xFFFF);
  }
  return top + std::log2(sum);
}

// Write sums of a tile as rows of D numbers.
struct ToRows {
  uint16_t *rows;
  size_t stride;
  int D;
  void operator()(int r, int b, Floats sum) const {
    const __mmask16 mask = lanes(D - b * LANES);
    if (mask) store(rows + r * stride + b * LANES, sum, mask);
  }
};

// out: rows of D, `stride` apart; log_sums (T)
void attend(const Head &head, uint16_t *out, size_t stride, float *log_sums) {
  const int T = head.T, D = head.D;
  const size_t width = head.width();
  thread_local std::vector<Line> packed;
  thread_local std::vector<float> all_scores;
  thread_local std::vector<uint16_t> all_probabilities;
  Words *keys = (Words *)room(packed, head.row_panels() + head.column_panel());
  Words *values = keys + head.row_panels();
  float *scores = room(all_scores, TILE * width);                        // (TILE, width)
  uint16_t *probabilities = room(all_probabilities, TILE * width);  // (TILE, width)
  pack_head_rows(head.k, head.stride, keys, T, D);
  pack_panel(head.v, head.stride, values, T, D);
  in_tiles(0, T, [&](int t, int rows) {
    const Rows queries = words_of(head.q + t * head.stride, head.stride);
    for (int k = 0; k < t + rows; k += PANEL)
      product(rows, queries, keys + (size_t)(k / PANEL) * D / 2 * BLOCKS, D / 2, zero,
              [&](int r, int b, Floats sum) {
                store(scores + r * width + k + b * LANES, sum, 0xFFFF);
              });
    const int words = (t + rows + 1) / 2;
    for (int r = 0; r < rows; ++r) {
      uint16_t *row = probabilities + r * width;
      std::fill(row + t + r + 1, row + 2 * words, 0);
      log_sums[t + r] = softmax(scores + r * width, t + r + 1, head.scale(), row);
    }
    product(rows, words_of(probabilities, width), values, words, zero,
            ToRows{out + t * stride, stride, D});
  });
}

// What the gradients of a head are made from, and of QUERIES queries at a time.
struct Backward {
  Head head;
  const uint16_t *out, *grad;  // (T, D), rows `stride` apart
  size_t stride;
  const float *log_sums;  // (T)
  Words *key_rows, *value_rows, *keys, *queries, *grads;  // packed
  // Probabilities and the gradients of scores: words along the queries, (QUERIES / 2, width).
  int32_t *p_words, *s_words;
  uint16_t *s_rows;           // (TILE, width)
  float *key_grad, *value_grad;  // (T, 64)
};

// Probabilities and the gradients of the scores of queries t .. t + rows - 1, to all their keys.
void score_gradients(const Backward &w, int t, int rows, int32_t *p_words, int32_t *s_words) {
  const Head &head = w.head;
  const size_t width = head.width();
  const Floats scale = _mm512_set1_ps(head.scale());
  const Floats scale_2 = _mm512_set1_ps(head.scale() * LOG2_E);
  Floats delta[TILE], base[TILE];  // delta: the sum of out * grad
  for (int r = 0; r < rows; ++r) {
    Floats sum = zero(0, 0);
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
    product(rows, words_of(head.q + t * head.stride, head.stride), w.key_rows + panel, head.D / 2,
            zero, [&](int r, int b, Floats sum) { scores[r][b] = sum; });
    product(rows, words_of(w.grad + t * w.stride, w.stride), w.value_rows + panel, head.D / 2,
            zero, [&](int r, int b, Floats sum) { grads[r][b] = sum; });
    for (int b = 0; b < BLOCKS; ++b) {
      const int column = k + b * LANES;
      for (int r = 0; r < rows; r += 2) {
        Floats p[2], s[2];
        for (int o = 0; o < 2; ++o) {
          const __mmask16 mask = r + o < rows ? lanes(t + r + o + 1 - column) : 0;
          p[o] = s[o] = zero(0, 0);
          if (!mask) continue;
          p[o] = exp2(_mm512_fmsub_ps(scores[r + o][b], scale_2, base[r + o]));
          p[o] = _mm512_maskz_mov_ps(mask, p[o]);
          s[o] = _mm512_mul_ps(p[o], _mm512_sub_ps(grads[r + o][b], delta[r + o]));
          s[o] = _mm512_mul_ps(s[o], scale);
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
      product(
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
      product(rows, words_of(w.s_rows, width), w.keys, (t + rows + 1) / 2, zero,
              ToRows{dq + t * head.stride, head.stride, D});
    }
    add_to_keys(w, first, last);
  }
  for (int t = 0; t < T; ++t)
    for (int b = 0; b < BLOCKS; ++b) {
      const size_t from = t * PANEL + b * LANES;
      ToRows{dk, head.stride, D}(t, b, load(w.key_grad + from, 0xFFFF));
      ToRows{dv, head.stride, D}(t, b, load(w.value_grad + from, 0xFFFF));
    }
}

}  // namespace
