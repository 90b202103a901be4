// What adapters add to linear layers of a decoding step: x A^T B^T for each row that has one.
//
// Hu et al. 2022, LoRA; many adapters over one base: Chen et al. 2023, Punica, and Sheng et al.
// 2023, S-LoRA. `shrink` makes x A^T where a row is read, `expand` adds its product with B^T to the
// sums of a panel, whose part of B^T was prefetched before the panel was multiplied. Both use a
// row's own numbers alone, in one fixed order.

#pragma once

#include "decode.h"
#include "gemm.h"

namespace {

// Sums that `shrink` makes side by side; a rank is a whole number of them.
constexpr int RANK_STEP = 4;
// How far ahead of the numbers that are read A is prefetched.
constexpr int AHEAD = 1024;

struct Added {  // to a layer's outputs
  const LowRank *const *adapters;
  int number;     // of the layer
  float *narrow;  // (N, stride): x A^T of each row
  int stride;

  const LowRank *of(int row) const {
    const LowRank *layers = adapters && number >= 0 ? adapters[row] : nullptr;
    return layers && layers[number].rank ? layers + number : nullptr;
  }

  float *row(int row) const { return narrow + (size_t)row * stride; }
};

template <typename Number>
inline void shrink(const LowRank &low, const float *x, int inputs, float *narrow) {
  const Number *a = (const Number *)low.a;
  for (int k = 0; k < low.rank; k += RANK_STEP) {
    Floats sums[RANK_STEP];
    for (Floats &sum : sums) sum = Floats{};
    for (int i = 0; i < inputs; i += LANES) {
      const Floats numbers = load(x + i, lanes(inputs - i));
      fetch(a + AHEAD, RANK_STEP * LANES);
#pragma GCC unroll 4
      for (int s = 0; s < RANK_STEP; ++s, a += LANES) sums[s] = fmadd(numbers, load(a), sums[s]);
    }
    for (int s = 0; s < RANK_STEP; ++s) narrow[k + s] = reduce_add(sums[s]);
  }
}

// x (inputs): a row.
inline void shrink(const Added &added, int row, const float *x, int inputs) {
  const LowRank *low = added.of(row);
  if (!low) return;
  if (low->kind == BF16)
    shrink<uint16_t>(*low, x, inputs, added.row(row));
  else
    shrink<float>(*low, x, inputs, added.row(row));
}

template <typename Number>
inline Floats expand(const LowRank &low, const float *narrow, size_t column, Floats y) {
  const size_t panel = column / PANEL;
  const Number *b = (const Number *)low.b + panel * low.rank * PANEL + column % PANEL;
  for (int k = 0; k < low.rank; ++k, b += PANEL) y = fmadd(all(narrow[k]), load(b), y);
  return y;
}

// y and what is added to it: 16 of a row's outputs, from a column on.
inline Floats expand(const Added &added, int row, size_t column, Floats y) {
  const LowRank *low = added.of(row);
  if (!low) return y;
  return low->kind == BF16 ? expand<uint16_t>(*low, added.row(row), column, y)
                           : expand<float>(*low, added.row(row), column, y);
}

template <typename Number>
inline void fetch(const LowRank &low, int panel, int panels) {
  const size_t count = (size_t)low.rank * PANEL;
  fetch((const Number *)low.b + panel * count, count);
  const LowRank &next = (&low)[1];
  const size_t share = ((size_t)next.rank * next.inputs + panels - 1) / panels;
  if (next.rank) fetch((const Number *)next.a + panel * share, share);
}

// Prefetch what rows first .. stop - 1 add to a panel, and a share of what the next layer reads of
// A: memory is slow, and the product of the panel comes before both.
inline void fetch(const Added &added, int panel, int panels, int first, int stop) {
  for (int row = first; row < stop; ++row) {
    const LowRank *low = added.of(row);
    if (!low || (row > first && low == added.of(row - 1))) continue;
    if (low->kind == BF16)
      fetch<uint16_t>(*low, panel, panels);
    else
      fetch<float>(*low, panel, panels);
  }
}

}  // namespace
