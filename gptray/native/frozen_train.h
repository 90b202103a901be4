// Linear layers with frozen W (N, K) in bf16 and an adapter (Hu et al. 2022, LoRA):
// y = x W^T + b + u B^T with u (M, R) = x A^T, and dx = dy W + (du A) times a mask. W and the
// adapter's matrix are packed one after the other, and each sum runs through both. All threads of a
// parallel region call these functions and share their loops.

#pragma once

#include "activation.h"
#include "linear_train.h"

namespace {

// The adapter's R numbers per row, and the matrix that multiplies them; R 0 for no adapter.
struct Adapter {
  const uint16_t *rows;  // (M, R)
  const float *matrix;   // B (N, R), or A (R, K) in the backward pass
  int R;                 // even
  const uint16_t *mask;  // times the product, or nullptr
};

// panels: the packed matrix.
inline LowRankProduct low_rank_product(const Adapter &adapter, const Words *panels) {
  return {(const int32_t *)adapter.rows, panels, adapter.R / 2, adapter.mask};
}

// y (M, N), and the slopes of an activation; for gates, W has 2 N rows.
void frozen_layer(const uint16_t *x, const uint16_t *w, const float *b, const Adapter &adapter,
                  uint16_t *y, uint16_t *slopes, Words *work, int M, int N, int K,
                  Activation activation) {
  const bool gated = is_gated(activation);
  const int columns = gated ? gated_panel_count(N) : panel_count(N);
  Words *narrow = work + (size_t)columns * BLOCKS * (K / 2);
  const LowRankProduct low = low_rank_product(adapter, narrow);
  if (gated)
    pack_gated_rows(w, work, N, K), pack_gated_rows(adapter.matrix, narrow, N, adapter.R);
  else
    pack_rows(w, work, N, K), pack_rows(adapter.matrix, narrow, N, adapter.R);
  const Output to = {y, N, b};
  const auto run = [&](auto out) { multiply((const int32_t *)x, work, M, K / 2, out, low); };
  switch (activation) {
    case NONE: return run(to);
    case GELU_TANH: run(WithSlope<gelu_and_slope>{{to, slopes, {}}}); break;
    case GELU: run(WithSlope<exact_gelu_and_slope>{{to, slopes, {}}}); break;
    case RELU: run(WithSlope<relu_and_slope>{{to, slopes, {}}}); break;
    case SWIGLU: run(WithGates<swiglu>{{to, slopes, {}}}); break;
    case GEGLU: run(WithGates<geglu>{{to, slopes, {}}}); break;
  }
  end_streams();  // after store_stream
}

// dx (M, K), times the slopes of the activation that made x, unless it is NONE; for gates, these
// and dx are (M, 2 K).
void frozen_gradient(const uint16_t *dy, const uint16_t *w, const Adapter &adapter,
                     const uint16_t *slopes, uint16_t *dx, Words *work, int M, int N, int K,
                     Activation activation) {
  Words *narrow = work + (size_t)panel_count(K) * BLOCKS * (N / 2);
  const LowRankProduct low = low_rank_product(adapter, narrow);
  pack_columns(w, work, N, K);
  pack_columns(adapter.matrix, narrow, adapter.R, K);
  const Output to = {dx, K, nullptr};
  const auto run = [&](auto out) { multiply((const int32_t *)dy, work, M, N / 2, out, low); };
  switch (activation) {
    case NONE: return run(to);
    case SWIGLU:
    case GEGLU: return run(Gates{to, slopes});
    default: return run(Sloped{to, slopes});
  }
}

// Rows at once of a product with one or two blocks of columns: enough sums to hide the latency.
constexpr int NARROW_TILE = IN_PAIRS ? IN_REGISTERS : SUMS / 2;

// ROWS rows by the first USED blocks of a panel of `count` words.
template <int ROWS, int USED>
inline void narrow_tile(const int32_t *x, const Words *panel, int count, const Output &to,
                        int row) {
  if constexpr (IN_PAIRS)
    return paired_tile<Bf16, ROWS + ROWS % 2, USED>(
        ROWS, {x, (size_t)count, 1}, panel, count, FromZero<Bf16>{},
        [&](int r, int b, Floats sum) { to.take(row + r, b * LANES, sum, to.mask(b * LANES)); });
  Floats sums[ROWS][USED] = {};
  for (int k = 0; k < count; ++k, panel += BLOCKS) {
    Words first = load((const int32_t *)panel), last = load((const int32_t *)(panel + USED - 1));
    keep_in_registers(first, last);
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; ++r) {
      const Words word = splat(x[(size_t)r * count + k]);
      sums[r][0] = Bf16::add(sums[r][0], word, first);
      if (USED > 1) sums[r][USED - 1] = Bf16::add(sums[r][USED - 1], word, last);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
    for (int b = 0; b < USED; ++b) to.take(row + r, b * LANES, sums[r][b], to.mask(b * LANES));
}

template <int USED>
void narrow_product(const int32_t *x, const Words *panel, int M, int count, const Output &to) {
  const auto run = [&](int row, int rows) {
    const int32_t *from = x + (size_t)row * count;
    if (rows == NARROW_TILE) return narrow_tile<NARROW_TILE, USED>(from, panel, count, to, row);
    for (int r = 0; r < rows; ++r)
      narrow_tile<1, USED>(from + (size_t)r * count, panel, count, to, row + r);
  };
#pragma omp for schedule(static)
  for (int row = 0; row < M; row += NARROW_TILE) run(row, std::min(NARROW_TILE, M - row));
}

// `multiply`, by the variant that is fastest for so many columns.
void multiply_any(const uint16_t *x, const Words *panels, int M, int count, const Output &to) {
  const int32_t *words = (const int32_t *)x;
  if (to.bias || to.N > 2 * LANES)
    multiply(words, panels, M, count, to);
  else if (to.N > LANES)
    narrow_product<2>(words, panels, M, count, to);
  else
    narrow_product<1>(words, panels, M, count, to);
}

}  // namespace
