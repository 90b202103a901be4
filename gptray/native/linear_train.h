// Linear layers: y (M, N) = x (M, K) W^T + b, with W (N, K) and b in fp32, and their gradients.
// All threads of a parallel region call these functions and share their loops.

#pragma once

#include "gates.h"
#include "panels.h"

namespace {

constexpr int CHUNK = 256;  // words of two panels that fit in the cache together

// Results (M, N) in bf16. Sums start from a bias (N), or from 0 if there is none. A tile's
// destination is prefetched before its products are computed.
struct Output {
  uint16_t *y;
  int N;
  const float *bias;

  int panels() const { return panel_count(N); }
  Floats start(int column) const {
    return bias ? load(bias + column, lanes(N - column)) : Floats{};
  }
  Mask mask(int column) const { return lanes(N - column); }
  size_t at(int row, int column) const { return (size_t)row * N + column; }
  void begin(int row, int rows, int column) const {
    for (int r = row; r < row + rows; ++r) prefetch(y + at(r, column), PANEL);
  }
  void take(int row, int column, Floats sum, Mask mask) const {
    store(y + at(row, column), sum, mask);
  }
  void end(int, int, int) const {}
};

// Results times a slope (M, N).
struct Sloped : Output {
  const uint16_t *slope;

  void begin(int row, int rows, int column) const {
    Output::begin(row, rows, column);
    for (int r = row; r < row + rows; ++r) prefetch(slope + at(r, column), PANEL);
  }
  void take(int row, int column, Floats sum, Mask mask) const {
    Output::take(row, column, sum * load(slope + at(row, column), mask), mask);
  }
};

// Results times two slopes (M, 2 N), first those by gates, then those by inputs: (M, 2 N).
struct Gates : Output {
  const uint16_t *slopes;

  template <typename Run>
  void each(int row, int column, const Run &run) const {
    const size_t gate = 2 * at(row, 0) + column;
    run(gate), run(gate + N);
  }
  void begin(int row, int rows, int column) const {
    for (int r = row; r < row + rows; ++r)
      each(r, column, [&](size_t at) { prefetch(y + at, PANEL), prefetch(slopes + at, PANEL); });
  }
  void take(int row, int column, Floats sum, Mask mask) const {
    each(row, column, [&](size_t at) { store(y + at, sum * load(slopes + at, mask), mask); });
  }
};

// A function of the results, and its slope. A tile's sums are buffered in memory first: computing
// in registers would have to wait for the products.
struct Buffered : Output {
  uint16_t *slope;
  alignas(64) float sums[TILE][PANEL];

  void take(int row, int column, Floats sum, Mask) {
    store(sums[row % TILE] + column % PANEL, sum);
  }
  Floats buffered(int row, int column) const { return load(sums[row % TILE] + column % PANEL); }
};

template <ValueAndSlope of(Floats)>
struct WithSlope : Buffered {
  void end(int row, int rows, int column) const {
    for (int r = row; r < row + rows; ++r)
      for (int c = column; c < std::min(column + PANEL, N); c += LANES) {
        const ValueAndSlope result = of(buffered(r, c));
        store(y + at(r, c), result.value, lanes(N - c));
        store_stream(slope + at(r, c), result.slope, lanes(N - c));
      }
  }
};

// Gated values (M, N) of results in panels of gates and inputs, with a bias (2 N) or none; their
// slopes are (M, 2 N).
template <Gated of(Floats, Floats)>
struct WithGates : Buffered {
  int panels() const { return gated_panel_count(N); }
  Floats start(int column) const {
    const int gate = gate_of(column);
    return bias ? load(bias + (is_gate(column) ? gate : N + gate), lanes(N - gate)) : Floats{};
  }
  Mask mask(int column) const { return lanes(N - gate_of(column)); }
  void begin(int row, int rows, int column) const {
    for (int r = row; r < row + rows; ++r) prefetch(y + at(r, gate_of(column)), GATES);
  }
  void end(int row, int rows, int column) const {
    for (int r = row; r < row + rows; ++r)
      for (int c = column; c < column + GATES && mask(c); c += LANES) {
        const Gated result = of(buffered(r, c), buffered(r, c + GATES));
        const size_t gate = at(r, gate_of(c)), slopes = 2 * at(r, 0) + gate_of(c);
        store(y + gate, result.value, mask(c));
        store_stream(slope + slopes, result.by_gate, mask(c));
        store_stream(slope + slopes + N, result.by_input, mask(c));
      }
  }
};

// A low-rank product to add to another's sums: rows (M) of `count` words by panels in the same
// layout, times a mask of the sums' shape if there is one.
struct LowRankProduct {
  const int32_t *rows;
  const Words *panels;
  int count;  // 0: nothing to add
  const uint16_t *mask;
};

// Rows (M) of `count` words by panels. `to` gives the number of panels and the sums' start, takes
// the sums 16 at a time, and is called before and after each tile.
template <typename Output>
void multiply(const int32_t *x, const Words *panels, int M, int count, Output to,
              const LowRankProduct &low = {}) {
  const TileUse tiles;
  const int panel_count = to.panels(), blocks = row_blocks(M);
#pragma omp for collapse(2) schedule(static)
  for (int block = 0; block < blocks; ++block)
    for (int panel = 0; panel < panel_count; ++panel) {
      const int column = panel * PANEL;
      const Words *w = panels + (size_t)panel * count * BLOCKS;
      Floats start[BLOCKS];
      for (int b = 0; b < BLOCKS; ++b) start[b] = to.start(column + b * LANES);
      in_tiles(block_start(block, M), block_start(block + 1, M), [&](int row, int rows) {
        to.begin(row, rows, column);
        alignas(64) float begun[TILE][PANEL];
        if (low.count)
          product<Bf16>(rows, {low.rows + (size_t)row * low.count, (size_t)low.count, 1},
                        low.panels + (size_t)panel * low.count * BLOCKS, low.count,
                        FromZero<Bf16>{}, [&](int r, int b, Floats sum) {
                          const int at = column + b * LANES;
                          if (low.mask && to.mask(at))
                            sum = sum * load(low.mask + to.at(row + r, at), to.mask(at));
                          store(begun[r] + b * LANES, start[b] + sum);
                        });
        product<Bf16>(
            rows, {x + (size_t)row * count, (size_t)count, 1}, w, count,
            [&](int r, int b) { return low.count ? load(begun[r] + b * LANES) : start[b]; },
            [&](int r, int b, Floats sum) {
              const Mask mask = to.mask(column + b * LANES);
              if (mask) to.take(row + r, column + b * LANES, sum, mask);
            });
        to.end(row, rows, column);
      });
    }
}

// Column sums (columns) of a packed panel.
void sum_panel(const Words *panel, int words, float *sum, int columns) {
  for (int b = 0; b < BLOCKS; ++b) {
    Floats even = {}, odd = even;
    for (int k = 0; k < words; ++k) {
      const Words w = word_of(panel, words, k, b);
      even = even + even_of(w), odd = odd + odd_of(w);
    }
    const Mask mask = lanes(columns - b * LANES);
    if (mask) store(sum + b * LANES, even + odd, mask);
  }
}

// left^T right, 64 x 64, of two panels of `words` words, left being transposed (`transpose_left`):
// written to out (rows, stride), or added to it.
void multiply_panels(const Words *left, const Words *right, int words, float *out, size_t stride,
                     int rows, int columns, bool adds) {
  alignas(64) float sums[PANEL][PANEL];
  for (int first = 0; first < words; first += CHUNK) {
    const int count = std::min(CHUNK, words - first);
    const bool last = first + count == words;
    in_tiles(0, rows, [&](int row, int height) {
      const auto at = [&](int r, int b) { return out + (row + r) * stride + b * LANES; };
      const auto mask = [&](int b) { return lanes(columns - b * LANES); };
      product<Bf16>(
          height,
          {(const int32_t *)(left + (size_t)first * BLOCKS) + row * LEFT_STEP, LEFT_STEP, PANEL},
          right + (size_t)first * BLOCKS, count,
          [&](int r, int b) {
            // Not a load with an empty mask, which is slow on a stack page that is not mapped yet.
            if (first) return load(sums[row + r] + b * LANES);
            return adds ? load(at(r, b), mask(b)) : Floats{};
          },
          [&](int r, int b, Floats sum) {
            if (!last)
              store(sums[row + r] + b * LANES, sum);
            else if (mask(b))
              store(at(r, b), sum, mask(b));
          });
    });
  }
}

// dw (N, K) = dy^T x; db (N) = the column sums of dy, unless it is nullptr. The wider of dy and x
// is packed a panel at a time, by the thread that uses it, and stays cached; the other one as a
// whole.
void weight_gradient(const uint16_t *dy, const uint16_t *x, float *dw, float *db, Words *all, int M,
                     int N, int K) {
  const TileUse tiles;
  const int words = column_words(M);
  const size_t size = (size_t)words * BLOCKS;
  const bool x_is_wider = K > N;
  thread_local std::vector<Line> packed;
  Words *own = (Words *)scratch(packed, size);
  pack_panels(x_is_wider ? dy : x, all, M, x_is_wider ? N : K);
  const int n_panels = panel_count(N), k_panels = panel_count(K);
  if (x_is_wider && (db || HAS_TILES))
#pragma omp for schedule(static)
    for (int panel = 0; panel < n_panels; ++panel) {
      if (db) sum_panel(all + panel * size, words, db + panel * PANEL, N - panel * PANEL);
      transpose_left(all + panel * size, words);
    }
#pragma omp for schedule(static)
  for (int outer = 0; outer < std::max(n_panels, k_panels); ++outer) {
    const uint16_t *wider = x_is_wider ? x : dy;
    const int width = x_is_wider ? K : N;
    pack_panel(wider + outer * PANEL, width, own, M, width - outer * PANEL);
    if (!x_is_wider) {
      if (db) sum_panel(own, words, db + outer * PANEL, N - outer * PANEL);
      transpose_left(own, words);
    }
    for (int inner = 0; inner < std::min(n_panels, k_panels); ++inner) {
      const int n = (x_is_wider ? inner : outer) * PANEL, k = (x_is_wider ? outer : inner) * PANEL;
      const Words *left = x_is_wider ? all + inner * size : own;
      const Words *right = x_is_wider ? own : all + inner * size;
      multiply_panels(left, right, words, dw + (size_t)n * K + k, K, std::min(PANEL, N - n), K - k,
                      false);
    }
  }
}

}  // namespace
