// Adapters of a decoding step: x A^T B^T is added to a linear layer's outputs for each row that has
// an adapter.
//
// Hu et al. 2022, LoRA; many adapters over one base: Chen et al. 2023, Punica, and Sheng et al.
// 2023, S-LoRA. `shrink` computes x A^T when a row is packed; `expand` adds its product with B^T to
// a panel's sums, after the panel's part of B^T was prefetched. Both use only the row's own
// numbers, in one fixed order.

#pragma once

#include "decode.h"
#include "gemm.h"

namespace {

// Sums that `shrink` computes side by side; a rank is a multiple of it.
constexpr int RANK_STEP = 4;
// How far ahead to prefetch A, in numbers.
constexpr int AHEAD = 1024;

struct AdapterTerm {  // the adapters' part of a layer's outputs
  const LowRank *const *adapters;
  int number;     // the layer's
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
      prefetch(a + AHEAD, RANK_STEP * LANES);
#pragma GCC unroll 4
      for (int s = 0; s < RANK_STEP; ++s, a += LANES) sums[s] = fmadd(numbers, load(a), sums[s]);
    }
    for (int s = 0; s < RANK_STEP; ++s) narrow[k + s] = reduce_add(sums[s]);
  }
}

// x (inputs): a row.
inline void shrink(const AdapterTerm &added, int row, const float *x, int inputs) {
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
  for (int k = 0; k < low.rank; ++k, b += PANEL) y = fmadd(splat(narrow[k]), load(b), y);
  return y;
}

// y, 16 of a row's outputs from a column on, plus the adapter's part.
inline Floats expand(const AdapterTerm &added, int row, size_t column, Floats y) {
  const LowRank *low = added.of(row);
  if (!low) return y;
  return low->kind == BF16 ? expand<uint16_t>(*low, added.row(row), column, y)
                           : expand<float>(*low, added.row(row), column, y);
}

template <typename Number>
inline void prefetch(const LowRank &low, int panel, int panels) {
  const size_t count = (size_t)low.rank * PANEL;
  prefetch((const Number *)low.b + panel * count, count);
  const LowRank &next = (&low)[1];
  const size_t share = ((size_t)next.rank * next.inputs + panels - 1) / panels;
  if (next.rank) prefetch((const Number *)next.a + panel * share, share);
}

// Prefetch a panel's part of B^T for rows first .. stop - 1, and a share of the next layer's A, so
// that memory works while the panel is multiplied.
inline void prefetch(const AdapterTerm &added, int panel, int panels, int first, int stop) {
  for (int row = first; row < stop; ++row) {
    const LowRank *low = added.of(row);
    if (!low || (row > first && low == added.of(row - 1))) continue;
    if (low->kind == BF16)
      prefetch<uint16_t>(*low, panel, panels);
    else
      prefetch<float>(*low, panel, panels);
  }
}

}  // namespace
