// Linear layers of a decoding step: rows (N, inputs) fp32 -> (N, outputs) fp32.
//
// All threads of a parallel region call `linear` and share its loops.

#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "activation_decode.h"
#include "decode.h"
#include "gemm.h"
#include "grouped_decode.h"
#include "low_rank_decode.h"
#include "norm.h"
#include "team.h"

namespace {

// Up to so many rows, each thread packs them for itself: that is faster than waiting for another.
constexpr int OWN_ROWS = 4;
// How far ahead of tiles to prefetch weights, in bytes.
constexpr int AHEAD_OF_TILES = 2048;

inline int word_count(const Linear &linear) {
  const int per_word = linear.kind == INT8 ? 4 : linear.kind == BF16 ? 2 : 1;
  return (linear.inputs + per_word - 1) / per_word;
}

// The stride of packed rows, in words: they are written 16 words at a time, or group by group.
inline size_t row_words(const Linear &linear) {
  if (linear.kind >= INT4) return group_count(linear.inputs, GROUP) * sizeof(RowGroup<GROUP>) / 4;
  if (linear.kind == INT8)
    return group_count(linear.inputs, INT8_GROUP) * sizeof(RowGroup<INT8_GROUP>) / 4;
  return (word_count(linear) + LANES - 1) / LANES * LANES;
}

// Bytes of a panel.
inline size_t panel_size(const Linear &linear) {
  if (linear.kind >= INT4) return group_count(linear.inputs, GROUP) * sizeof(PanelGroup);
  return (size_t)word_count(linear) * PANEL * sizeof(int32_t);
}

// The weights (inputs) of one output of an fp32 or bf16 layer.
inline void read_row(const Linear &linear, size_t output, float *to) {
  const int words = word_count(linear), column = output % PANEL;
  const uint32_t *panel = (const uint32_t *)linear.weight + output / PANEL * words * PANEL;
  for (int i = 0; i < linear.inputs; ++i) {
    uint32_t bits;
    if (linear.kind == BF16) {
      bits = panel[place_in_panel(i / 2, column, words)];
      bits = i % 2 ? bits & 0xFFFF0000 : bits << 16;
    } else {
      bits = panel[(size_t)i * PANEL + column];
    }
    std::memcpy(to + i, &bits, sizeof bits);
  }
}

// Put a layer's packed words into pairs, if products read them so.
void pair_words(const Linear &linear) {
  if (!IN_PAIRS || (linear.kind != BF16 && linear.kind != INT8)) return;
  const int words = word_count(linear);
  for (int panel = 0; panel < panel_count(linear.outputs); ++panel)
    pair_words((int32_t *)linear.weight + (size_t)panel * words * PANEL, words);
}

// Pack a row into words; those beyond it are 0 or are multiplied by weights of 0.
void to_words(const float *row, int size, int kind, int32_t *words) {
  switch (kind) {
    case FP32: std::memcpy(words, row, size * sizeof(float)); break;
    case BF16:
      for (int i = 0; i < size; i += LANES)
        store((uint16_t *)words + i, load(row + i, lanes(size - i)));
      break;
    case INT8: to_groups(row, size, BYTE_BIAS, (RowGroup<INT8_GROUP> *)words); break;
    case INT4: to_groups(row, size, Int4::added, (RowGroup<GROUP> *)words); break;
    default: to_groups(row, size, Iq4::added, (RowGroup<GROUP> *)words);
  }
}

// Scale and bias of 16 outputs from a column on.
struct Outputs {
  Mask mask;
  bool has_bias, has_scale;
  Floats bias, scale;

  Outputs(const Linear &linear, int column)
      : mask(lanes(linear.outputs - column)), has_bias(linear.bias), has_scale(linear.scale) {
    if (has_bias) bias = load(linear.bias + column, mask);
    if (has_scale) scale = load(linear.scale + column, mask);
  }

  Floats operator()(Floats sum) const {
    if (has_scale) sum = sum * scale;
    return has_bias ? sum + bias : sum;
  }
};

struct Results {
  float *rows;       // (N, stride)
  const float *add;  // (N, stride), or null
  int stride;
  int activation = NONE;
};

struct Input {  // packed rows, and the adapters' part of their products
  const int32_t *words;
  AdapterTerm added;
};

// The sums of a tile's rows by one panel -> results from row `first` on.
inline void finish(const Floats (*sums)[BLOCKS], const Linear &linear, int panel, const Input &x,
                   const Results &to, int first, int rows) {
  const bool gated = is_gated(to.activation);
  const int blocks = gated ? BLOCKS / 2 : BLOCKS, end = gated ? to.stride : linear.outputs;
  for (int b = 0; b < blocks; ++b) {
    const int from = panel * PANEL + b * LANES, column = (panel * blocks + b) * LANES;
    if (column >= end) break;
    const Mask mask = lanes(end - column);
    const Outputs outputs(linear, from);
    const int let_through = gated ? from + PANEL / 2 : from;
    const Outputs inputs(linear, let_through);
    for (int r = 0; r < rows; ++r) {
      const int row = first + r;
      const size_t at = (size_t)row * to.stride + column;
      Floats y = expand(x.added, row, from, outputs(sums[r][b]));
      if (gated) {
        const Floats inner = inputs(sums[r][b + BLOCKS / 2]);
        const Floats gate = to.activation == GEGLU ? gelu(y) : silu(y);
        y = gate * expand(x.added, row, let_through, inner);
      } else {
        y = activate(to.activation, y);
      }
      if (to.add) y = y + load(to.add + at, mask);
      store(to.rows + at, y, mask);
    }
  }
}

// 4-bit weights are multiplied as int8.
template <int KIND>
using Number = std::conditional_t<KIND == FP32, Fp32, std::conditional_t<KIND == BF16, Bf16, Int8>>;

// Up to TILE packed rows by one panel.
template <int KIND, typename Meanwhile>
inline void multiply_tile(const Linear &linear, const void *panel, const int32_t *words, int rows,
                          Floats (*sums)[BLOCKS], const Meanwhile &meanwhile) {
  if constexpr (KIND >= INT4) {
    using Weights = std::conditional_t<KIND == INT4, Int4, Iq4>;
    grouped_product<Weights>(rows, (const RowGroup<GROUP> *)words, (const PanelGroup *)panel,
                             group_count(linear.inputs, GROUP), sums);
  } else if constexpr (KIND == INT8) {
    int8_product(rows, (const RowGroup<INT8_GROUP> *)words, (const Words *)panel,
                 word_count(linear), sums, meanwhile);
  } else {
    product<Number<KIND>>(
        rows, {words, row_words(linear), 1}, (const Words *)panel, word_count(linear),
        FromZero<Number<KIND>>{}, [&](int r, int b, Floats sum) { sums[r][b] = sum; }, meanwhile);
  }
}

// Rows first .. stop - 1 by one panel.
template <int KIND>
void multiply_panel(const Linear &linear, int panel, const Input &x, const Results &to, int first,
                    int stop) {
  const size_t size = panel_size(linear);
  const char *const weights = (const char *)linear.weight + panel * size;
  // The first pass brings a panel into the cache, and the others would leave memory idle: each
  // prefetches its share of the next panel. With tiles, processors run less far ahead by
  // themselves.
  const int count = passes<Number<KIND>>(stop - first);
  const int share = BLOCKS * sizeof(Words) / count;  // of a word
  const char *next = weights + size - size / count + AHEAD_OF_TILES;
  const auto prefetch_ahead = [&](int words) {
    if (!HAS_TILES) return;
    prefetch_l2(next, words * share);
    next += words * share;
  };
  const auto run = [&](int row, int rows) {
    prefetch(x.added, panel, panel_count(linear.outputs), row, row + rows);
    Floats sums[TILE][BLOCKS];  // in memory, so that the loops that follow are not unrolled
    multiply_tile<KIND>(linear, weights, x.words + row * row_words(linear), rows, sums,
                        prefetch_ahead);
    finish(sums, linear, panel, x, to, row, rows);
  };
  in_tiles(first, stop, run, KIND >= INT4 ? INT4_TILE : TILE);
}

void multiply(Team &team, const Linear &linear, const Input &x, int rows, const Results &to) {
  const TileUse tiles;
  constexpr void (*runs[])(const Linear &, int, const Input &, const Results &, int, int) = {
      multiply_panel<FP32>, multiply_panel<BF16>, multiply_panel<INT8>, multiply_panel<INT4>,
      multiply_panel<IQ4_NL>};
  const int blocks = (rows + ROW_BLOCK - 1) / ROW_BLOCK;
  team.share(blocks, panel_count(linear.outputs), [&](int block, int panel) {
    const int first = block * ROW_BLOCK;
    runs[linear.kind](linear, panel, x, to, first, std::min(first + ROW_BLOCK, rows));
  });
}

// The layer's outputs for x (N, inputs), or for the `chosen` rows of it, after `norm` if given.
void linear(Team &team, const Linear &linear, const Step &step, const float *x, const Norm *norm,
            const int32_t *chosen, int rows, const Results &to) {
  AdapterTerm added{step.adapters, linear.number, step.narrow, step.most_rank};
  const auto read = [&](int row, int32_t *words) {
    const float *from = x + (size_t)(chosen ? chosen[row] : row) * linear.inputs;
    thread_local std::vector<float> normed;
    if (norm && norm->weight) {
      normed.resize(linear.inputs);
      normalise(from, norm->weight, norm->bias, normed.data(), norm->eps, linear.inputs);
      from = normed.data();
    }
    shrink(added, row, from, linear.inputs);
    to_words(from, linear.inputs, linear.kind, words + row * row_words(linear));
  };
  if (rows <= OWN_ROWS) {
    thread_local std::vector<int32_t> words;
    words.resize(std::max(words.size(), rows * row_words(linear)));
    thread_local std::vector<float> narrow;
    narrow.resize(std::max<size_t>(narrow.size(), rows * added.stride));
    added.narrow = narrow.data();
    for (int row = 0; row < rows; ++row) read(row, words.data());
    multiply(team, linear, {words.data(), added}, rows, to);
  } else {
#pragma omp for schedule(static)
    for (int row = 0; row < rows; ++row) read(row, step.words);
    multiply(team, linear, {step.words, added}, rows, to);
  }
}

}  // namespace
