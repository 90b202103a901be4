// Causal attention of one head: T tokens; queries, keys and values of D numbers each, D even.
// Probabilities are not stored: the backward pass recomputes them, a few queries at a time.

#pragma once

#include <cmath>
#include <cstring>

#include "exp.h"
#include "panels.h"

namespace {

// Queries whose gradients are summed together: whole tiles and panels.
constexpr int QUERIES = 192;
static_assert(QUERIES % TILE == 0 && QUERIES % PANEL == 0);

// Rows of a head, `stride` numbers apart.
template <typename T>
struct Strided {
  T *first;
  size_t stride;

  T *row(int t) const { return first + t * stride; }
};

using From = Strided<const uint16_t>;
using To = Strided<uint16_t>;

// Sizes of a head of T rows of D numbers.
struct Size {
  int T, D;

  float scale() const { return 1.f / std::sqrt((float)D); }
  int panels() const { return panel_count(D); }  // along D
  size_t row_panels() const { return (size_t)panel_count(T) * D / 2 * BLOCKS; }
  size_t column_panel() const { return (size_t)column_words(T) * BLOCKS; }
  size_t column_panels() const { return panels() * column_panel(); }
  // Stride of a row of scores: no power of 2, or all rows would compete for a few cache sets.
  size_t width() const { return (size_t)panel_count(T) * PANEL + LANES; }
};

// Rows of a head -> panels of 64 rows, words along D.
void pack_head_rows(From x, Words *panels, Size size) {
  for (int block = 0; block < panel_count(size.T) * BLOCKS; ++block)
    pack_block(
        [&](int r, int k) {
          const int row = block * LANES + r;
          return load((const int32_t *)(x.row(row) + 2 * k),
                      row < size.T ? lanes(size.D / 2 - k) : 0);
        },
        panels, block, size.D / 2);
}

// Rows of a head -> panels of 64 columns, words along T.
void pack_head_columns(From x, Words *panels, Size size) {
  for (int p = 0; p < size.panels(); ++p)
    pack_panel(x.first + p * PANEL, x.stride, panels + p * size.column_panel(), size.T,
               size.D - p * PANEL);
}

Rows words_of(const uint16_t *rows, size_t stride) {
  return {(const int32_t *)rows, stride / 2, 1};
}

// Writes a tile's sums, times a factor per row, as rows of D numbers.
struct ToRows {
  uint16_t *rows;
  size_t stride;
  int D;
  const float *factors;
  void operator()(int r, int b, Floats sum) const {
    const Mask mask = lanes(D - b * LANES);
    sum = sum * splat(factors[r]);
    if (mask) store(rows + r * stride + b * LANES, sum, mask);
  }
};

// 2^(scale score - top) of one query's scores (count) in bf16, padded with zeros to a multiple of
// 16. Returns their sum.
float exponentials(const float *scores, int count, float scale, float top, uint16_t *out) {
  Floats total = {};
  for (int k = 0; k < count; k += LANES) {
    const Floats score = load(scores + k);
    Floats e = exp2(fmsub(score, splat(scale), splat(top)));
    e = where(lanes(count - k), e, Floats{});
    total = total + e;
    store(out + k, e);
  }
  return reduce_add(total);
}

// log_sums (T): log2 of each query's sum of exponentials.
void attend(From q, From k, From v, Size size, To out, float *log_sums) {
  const int D = size.D;
  const size_t width = size.width();
  thread_local std::vector<Line> packed;
  thread_local std::vector<float> all_scores;
  thread_local std::vector<uint16_t> all_powers;
  Words *keys = (Words *)scratch(packed, size.row_panels() + size.column_panels());
  Words *values = keys + size.row_panels();
  float *scores = scratch(all_scores, TILE * width);     // (TILE, width)
  uint16_t *powers = scratch(all_powers, TILE * width);  // (TILE, width)
  const float scale = size.scale() * LOG2_E;
  pack_head_rows(k, keys, size);
  pack_head_columns(v, values, size);
  in_tiles(0, size.T, [&](int t, int rows) {
    const Rows queries = words_of(q.row(t), q.stride);
    Floats most[TILE];
    std::fill(most, most + rows, splat(-INFINITY));
    for (int k = 0; k < t + rows; k += PANEL)
      product<Bf16>(rows, queries, keys + (size_t)(k / PANEL) * D / 2 * BLOCKS, D / 2,
                    FromZero<Bf16>{}, [&](int r, int b, Floats sum) {
                      const int column = k + b * LANES;
                      store(scores + r * width + column, sum);
                      most[r] = where(lanes(t + r + 1 - column), max(most[r], sum), most[r]);
                    });
    const int words = whole_words(t + rows);
    float factors[TILE];
    for (int r = 0; r < rows; ++r) factors[r] = scale * reduce_max(most[r]);
    for (int r = 0; r < rows; ++r) {
      uint16_t *row = powers + r * width;
      std::fill(row + t + r + 1, row + 2 * words, 0);
      const float top = factors[r];
      const float sum = exponentials(scores + r * width, t + r + 1, scale, top, row);
      log_sums[t + r] = top + std::log2(sum);
      factors[r] = 1 / sum;
    }
    for (int p = 0; p < size.panels(); ++p)
      product<Bf16>(rows, words_of(powers, width), values + p * size.column_panel(), words,
                    FromZero<Bf16>{},
                    ToRows{out.row(t) + p * PANEL, out.stride, D - p * PANEL, factors});
  });
}

// A head of queries, its output, and the output's gradient.
struct Queries {
  From q, out, grad;
  const float *log_sums;  // (T)
};

// The workspace for the gradients of query heads that share keys and values, QUERIES at a time.
struct BackwardWorkspace {
  Size size;
  Words *key_rows, *value_rows, *keys, *queries, *grads;  // packed
  // Probabilities, and gradients of scaled scores: words along queries, (QUERIES / 2, width).
  int32_t *p_words, *s_words;
  uint16_t *s_rows;              // (TILE, width)
  float *key_grad, *value_grad;  // (panels, T, 64)

  BackwardWorkspace(From k, From v, Size size) : size(size) {
    const size_t width = size.width(), words = QUERIES / 2 * width;
    const size_t grad = size.panels() * width * PANEL;
    thread_local std::vector<Line> packed;
    thread_local std::vector<int32_t> all_words;
    thread_local std::vector<uint16_t> all_rows;
    thread_local std::vector<float> all_grads;
    key_rows = (Words *)scratch(packed, 2 * size.row_panels() + 3 * size.column_panels());
    value_rows = key_rows + size.row_panels();
    keys = value_rows + size.row_panels();
    queries = keys + size.column_panels();
    grads = queries + size.column_panels();
    p_words = scratch(all_words, 2 * words);
    s_words = p_words + words;
    s_rows = scratch(all_rows, TILE * width);
    key_grad = scratch(all_grads, 2 * grad);
    value_grad = key_grad + grad;
    std::memset(key_grad, 0, 2 * grad * sizeof(float));
    pack_head_rows(k, key_rows, size);
    pack_head_rows(v, value_rows, size);
    pack_head_columns(k, keys, size);
  }
};

// Queries whose probabilities are stored at a time: of the words that stand side by side.
constexpr int AT_A_TIME = 2 * ABREAST;
static_assert(TILE % AT_A_TIME == 0);

// Probabilities and gradients of the scaled scores of queries t .. t + rows - 1 and all their keys.
void score_gradients(const BackwardWorkspace &w, const Queries &of, int t, int rows,
                     int32_t *p_words, int32_t *s_words) {
  const int D = w.size.D;
  const size_t width = w.size.width();
  const Floats scale = splat(w.size.scale() * LOG2_E);
  Floats delta[TILE], base[TILE];  // delta: the sum of out * grad
  for (int r = 0; r < rows; ++r) {
    Floats sum = {};
    for (int d = 0; d < D; d += LANES) {
      const Mask mask = lanes(D - d);
      sum = fmadd(load(of.out.row(t + r) + d, mask), load(of.grad.row(t + r) + d, mask), sum);
    }
    delta[r] = splat(reduce_add(sum));
    base[r] = splat(of.log_sums[t + r]);
  }
  for (int k = 0; k < t + rows; k += PANEL) {
    Floats scores[TILE][BLOCKS], grads[TILE][BLOCKS];
    const size_t panel = (size_t)(k / PANEL) * D / 2 * BLOCKS;
    product<Bf16>(rows, words_of(of.q.row(t), of.q.stride), w.key_rows + panel, D / 2,
                  FromZero<Bf16>{}, [&](int r, int b, Floats sum) { scores[r][b] = sum; });
    product<Bf16>(rows, words_of(of.grad.row(t), of.grad.stride), w.value_rows + panel, D / 2,
                  FromZero<Bf16>{}, [&](int r, int b, Floats sum) { grads[r][b] = sum; });
    for (int b = 0; b < BLOCKS; ++b) {
      const int column = k + b * LANES;
      for (int r = 0; r < rows; r += AT_A_TIME) {
        Floats p[AT_A_TIME], s[AT_A_TIME];
        for (int o = 0; o < AT_A_TIME; ++o) {
          const Mask mask = r + o < rows ? lanes(t + r + o + 1 - column) : 0;
          p[o] = s[o] = Floats{};
          if (!mask) continue;
          p[o] = exp2(fmsub(scores[r + o][b], scale, base[r + o]));
          p[o] = where(mask, p[o], Floats{});
          s[o] = p[o] * (grads[r + o][b] - delta[r + o]);
        }
        const auto put = [&](int32_t *to, const Floats *rows) {
          const auto word = [&](int k) { return pair(rows[2 * k - r], rows[2 * k - r + 1]); };
          put_words(to, width, r / 2, column, r / 2 + ABREAST, word);
        };
        put(p_words, p), put(s_words, s);
        for (int o = 0; o < AT_A_TIME && r + o < rows; ++o)
          store(w.s_rows + (r + o) * width + column, s[o]);
      }
    }
  }
}

// Add the contribution of queries first .. last - 1 to 64 columns of the gradients of keys and
// values.
void add_to_keys(const BackwardWorkspace &w, int p, int first, int last) {
  const size_t width = w.size.width();
  // In the same tiles as the queries, so that all words read here have been written.
  for (int k = 0; k < last; k += TILE) {
    const int rows = std::min(TILE, last - k);
    const int skip = std::max(k - first, 0) / 2;  // queries before these keys
    const int words = whole_words(last - first) - skip;
    const size_t at = skip * width + k * ABREAST;
    const size_t panel = p * w.size.column_panel() + (size_t)(first / 2 + skip) * BLOCKS;
    for (const bool is_key : {true, false}) {
      float *to = (is_key ? w.key_grad : w.value_grad) + (p * width + k) * PANEL;
      const Rows rows_of = {(is_key ? w.s_words : w.p_words) + at, ABREAST, width};
      product<Bf16>(
          rows, rows_of, (is_key ? w.queries : w.grads) + panel, words,
          [&](int r, int b) { return load(to + r * PANEL + b * LANES); },
          [&](int r, int b, Floats sum) { store(to + r * PANEL + b * LANES, sum); });
    }
  }
}

// Write the gradient of a head of queries; add to those of its keys and values.
void attend_backward(const BackwardWorkspace &w, const Queries &of, To dq) {
  const int T = w.size.T, D = w.size.D;
  const size_t width = w.size.width();
  float scales[TILE];
  std::fill(scales, scales + TILE, w.size.scale());
  pack_head_columns(of.q, w.queries, w.size);
  pack_head_columns(of.grad, w.grads, w.size);
  for (int first = 0; first < T; first += QUERIES) {
    const int last = std::min(first + QUERIES, T);
    for (int t = first; t < last; t += TILE) {
      const int rows = std::min(TILE, last - t);
      const size_t at = (t - first) / 2 * width;
      score_gradients(w, of, t, rows, w.p_words + at, w.s_words + at);
      for (int p = 0; p < w.size.panels(); ++p)
        product<Bf16>(rows, words_of(w.s_rows, width), w.keys + p * w.size.column_panel(),
                      whole_words(t + rows), FromZero<Bf16>{},
                      ToRows{dq.row(t) + p * PANEL, dq.stride, D - p * PANEL, scales});
    }
    for (int p = 0; p < w.size.panels(); ++p) add_to_keys(w, p, first, last);
  }
}

// Write the gradients of keys and values.
void write_gradients(const BackwardWorkspace &w, To dk, To dv) {
  const int D = w.size.D;
  const float scale = w.size.scale(), one = 1.f;
  for (int p = 0; p < w.size.panels(); ++p)
    for (int t = 0; t < w.size.T; ++t)
      for (int b = 0; b < BLOCKS; ++b) {
        const size_t from = (p * w.size.width() + t) * PANEL + b * LANES;
        const int left = D - p * PANEL;
        ToRows{dk.row(t) + p * PANEL, 0, left, &scale}(0, b, load(w.key_grad + from));
        ToRows{dv.row(t) + p * PANEL, 0, left, &one}(0, b, load(w.value_grad + from));
      }
}

}  // namespace
