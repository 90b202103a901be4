// Linear layers: x (M, K) to y (M, N) = x W^T + b, W (N, K) and b in fp32, and their gradients.
// All threads of a parallel region call these functions and share their loops.

#pragma once

#include <vector>

#include "words.h"

namespace {

constexpr int ROW_BLOCK = 96;  // rows that use a panel while it is near
constexpr int CHUNK = 256;     // words of two panels that are near together

// y (M, N) bf16 = rows of `count` words by panels, + bias (N) or nothing.
void multiply(const int32_t *x, const Words *panels, const float *bias, uint16_t *y, int M, int N,
              int count) {
#pragma omp for collapse(2) schedule(static)
  for (int first = 0; first < M; first += ROW_BLOCK)
    for (int panel = 0; panel < panel_count(N); ++panel) {
      const int column = panel * PANEL;
      const Words *w = panels + (size_t)panel * count * BLOCKS;
      Floats start[BLOCKS];
      for (int b = 0; b < BLOCKS; ++b)
        start[b] = load(bias + column + b * LANES, bias ? lanes(N - column - b * LANES) : 0);
      in_tiles(first, std::min(first + ROW_BLOCK, M), [&](int row, int rows) {
        uint16_t *to = y + (size_t)row * N + column;
        product(
            rows, {x + (size_t)row * count, (size_t)count, 1}, w, count,
            [&](int, int b) { return start[b]; },
            [&](int r, int b, Floats sum) {
              const __mmask16 mask = lanes(N - column - b * LANES);
              if (mask) store(to + (size_t)r * N + b * LANES, sum, mask);
            });
      });
    }
}

// Column sums (columns) of a packed panel.
void sum_panel(const Words *panel, int words, float *sum, int columns) {
  for (int b = 0; b < BLOCKS; ++b) {
    Floats even = zero(0, 0), odd = even;
    for (int k = 0; k < words; ++k) {
      const Words w = panel[(size_t)k * BLOCKS + b];
      even = _mm512_add_ps(even, _mm512_castsi512_ps(_mm512_slli_epi32(w, 16)));
      const Words high = _mm512_and_si512(w, _mm512_set1_epi32(0xFFFF0000));
      odd = _mm512_add_ps(odd, _mm512_castsi512_ps(high));
    }
    const __mmask16 mask = lanes(columns - b * LANES);
    if (mask) store(sum + b * LANES, _mm512_add_ps(even, odd), mask);
  }
}

// 64 rows and columns of left^T right, both panels of `words` words: out (rows, stride).
void multiply_panels(const Words *left, const Words *right, int words, float *out, size_t stride,
                     int rows, int columns) {
  alignas(64) float sums[PANEL][PANEL];
  for (int first = 0; first < words; first += CHUNK) {
    const int count = std::min(CHUNK, words - first);
    const bool last = first + count == words;
    in_tiles(0, rows, [&](int row, int height) {
      product(
          height, {(const int32_t *)(left + (size_t)first * BLOCKS) + row, 1, PANEL},
          right + (size_t)first * BLOCKS, count,
          [&](int r, int b) { return load(sums[row + r] + b * LANES, first ? 0xFFFF : 0); },
          [&](int r, int b, Floats sum) {
            const __mmask16 mask = lanes(columns - b * LANES);
            if (!last)
              store(sums[row + r] + b * LANES, sum, 0xFFFF);
            else if (mask)
              store(out + (row + r) * stride + b * LANES, sum, mask);
          });
    });
  }
}

// dw (N, K) = dy^T x, db (N) = the sums of dy's columns. The wider of both is packed a panel at a
// time, by whoever uses it, and stays near; the other one as a whole.
void weight_gradient(const uint16_t *dy, const uint16_t *x, float *dw, float *db, Words *all, int M,
                     int N, int K) {
  const int words = (M + 1) / 2;
  const size_t size = (size_t)words * BLOCKS;
  const bool x_is_wider = K > N;
  thread_local std::vector<Line> packed;
  Words *own = (Words *)room(packed, size);
  pack_panels(x_is_wider ? dy : x, all, M, x_is_wider ? N : K);
  const int n_panels = panel_count(N), k_panels = panel_count(K);
#pragma omp for schedule(static)
  for (int outer = 0; outer < std::max(n_panels, k_panels); ++outer) {
    const uint16_t *wider = x_is_wider ? x : dy;
    const int width = x_is_wider ? K : N;
    pack_panel(wider + outer * PANEL, width, own, M, width - outer * PANEL);
    if (!x_is_wider) sum_panel(own, words, db + outer * PANEL, N - outer * PANEL);
    for (int inner = 0; inner < std::min(n_panels, k_panels); ++inner) {
      const int n = (x_is_wider ? inner : outer) * PANEL, k = (x_is_wider ? outer : inner) * PANEL;
      const Words *left = x_is_wider ? all + inner * size : own;
      const Words *right = x_is_wider ? own : all + inner * size;
      multiply_panels(left, right, words, dw + (size_t)n * K + k, K, std::min(PANEL, N - n), K - k);
    }
  }
  if (x_is_wider)
#pragma omp for schedule(static)
    for (int panel = 0; panel < n_panels; ++panel)
      sum_panel(all + panel * size, words, db + panel * PANEL, N - panel * PANEL);
}

}  // namespace
