// The head and its cross-entropy: x (M, C) W (V, C)^T = logits (M, V), then -log softmax at the
// targets, and the gradients of its sum.
//
// Logits exist for one piece of the rows at a time, in bf16, and their gradient overwrites them;
// sums are fp32. All threads of a parallel region call `head_pass` and share its loops. The bits
// are the same at any number of threads.

#pragma once

#include <cmath>

#include "exp.h"
#include "linear_train.h"

namespace {

// Columns of logits that are stored together: CHUNK words.
constexpr int COLUMN_GROUP = 2 * CHUNK;
// Rows of W that are packed at a time for x's gradient.
constexpr int PACKED_ROWS = 4 * COLUMN_GROUP;
// One piece's logits: 680 rows of SmolLM2's vocabulary.
constexpr size_t PIECE_BYTES = 64 << 20;

struct Head {
  const float *weight;               // (V, C)
  int V, C, valid;                   // only the first `valid` of V are tokens
  const uint16_t *frozen = nullptr;  // the weight in bf16, if `weight` is nullptr

  // Pack 16 rows from `first` on, words along C.
  void pack_rows(int first, Words *panels, int block) const {
    const size_t at = (size_t)first * C;
    if (frozen)
      pack_row_block(frozen + at, V - first, panels, block, C);
    else
      pack_row_block(weight + at, V - first, panels, block, C);
  }
  // Pack `rows` rows from `first` on, words along the rows.
  void pack_columns(int first, Words *panels, int rows) const {
    const size_t at = (size_t)first * C;
    if (frozen)
      ::pack_columns(frozen + at, panels, rows, C);
    else
      ::pack_columns(weight + at, panels, rows, C);
  }
};

struct HeadRows {
  const uint16_t *x;       // (M, C)
  const int64_t *targets;  // (M)
  float *losses;           // (M)
  uint16_t *dx;            // (M, C)
};

// The number of rows in a piece of M rows; all pieces but the last have as many.
inline int piece_rows(int M, int V) {
  const size_t most = std::max<size_t>(1, PIECE_BYTES / ((size_t)V * sizeof(uint16_t)));
  const size_t pieces = (M + most - 1) / most;
  return (M + pieces - 1) / pieces;
}

// Buffers for a piece of `rows` rows. Their memory is reused: new pages cost more than the losses.
struct Piece {
  int rows = 0;
  std::vector<Line> logits, x, weight, sums;
  std::vector<float> log_sums;

  void fit(const Head &head, int most) {
    const size_t groups = (head.V + COLUMN_GROUP - 1) / COLUMN_GROUP, panels = panel_count(head.C);
    rows = most;
    scratch(logits, groups * rows * CHUNK / LANES);
    scratch(x, panels * BLOCKS * column_words(rows));
    scratch(weight, panels * BLOCKS * PACKED_ROWS / 2);
    scratch(sums, panels * BLOCKS * rows);
    scratch(log_sums, rows);
  }

  // Logits or their gradients, [group][row][column].
  uint16_t *at(int row, int column) {
    const size_t group = column / COLUMN_GROUP, at = column % COLUMN_GROUP;
    return (uint16_t *)logits.data() + (group * rows + row) * COLUMN_GROUP + at;
  }
  // Sums of x's gradient, [panel][row][column].
  float *sum(int row, int column) {
    const size_t panel = column / PANEL;
    return (float *)sums.data() + (panel * rows + row) * PANEL + column % PANEL;
  }
};

// Logits of `rows` rows; those beyond V are padding.
void make_logits(const Head &head, const uint16_t *x, Piece &piece, int rows) {
  const int words = head.C / 2;
  thread_local std::vector<Line> packed;
  Words *own = (Words *)scratch(packed, (size_t)words * BLOCKS);
#pragma omp for schedule(dynamic)
  for (int panel = 0; panel < panel_count(head.V); ++panel) {
    for (int b = 0; b < BLOCKS; ++b) head.pack_rows(panel * PANEL + b * LANES, own, b);
    in_tiles(0, rows, [&](int row, int height) {
      product<Bf16>(height, {(const int32_t *)x + (size_t)row * words, (size_t)words, 1}, own,
                    words, FromZero<Bf16>{}, [&](int r, int b, Floats sum) {
                      store(piece.at(row + r, panel * PANEL + b * LANES), sum);
                    });
    });
  }
}

// log sum e^z of a row of logits.
float log_sum(const Head &head, Piece &piece, int row) {
  Floats most = splat(-INFINITY), sum = {};
  for (int column = 0; column < head.valid; column += LANES) {
    const Mask mask = lanes(head.valid - column);
    most = where(mask, max(most, load(piece.at(row, column))), most);
  }
  most = splat(reduce_max(most));
  for (int column = 0; column < head.valid; column += LANES) {
    const Mask mask = lanes(head.valid - column);
    const Floats z = load(piece.at(row, column)) - most;
    sum = where(mask, sum + exp(z), sum);
  }
  return first_of(most) + std::log(reduce_add(sum));
}

void make_losses(const Head &head, const HeadRows &all, Piece &piece, int first, int rows) {
#pragma omp for schedule(static)
  for (int row = 0; row < rows; ++row) {
    const int target = all.targets[first + row], lane = target % LANES;
    const Floats z = load(piece.at(row, target - lane));
    piece.log_sums[row] = log_sum(head, piece, row);
    all.losses[first + row] =
        piece.log_sums[row] - reduce_add(where((Mask)(1u << lane), z, Floats{}));
  }
}

// A panel's logits -> d loss / dz = softmax - onehot, 0 for padding.
void to_gradients(const Head &head, const int64_t *targets, Piece &piece, int panel, int rows) {
  for (int row = 0; row < rows; ++row)
    for (int b = 0; b < BLOCKS; ++b) {
      const int column = panel * PANEL + b * LANES;
      const int64_t lane = targets[row] - column;
      const Mask hit = lane >= 0 && lane < LANES ? 1u << lane : 0;
      uint16_t *at = piece.at(row, column);
      const Floats off = load(at) - splat(piece.log_sums[row]);
      const Floats p = where(lanes(head.valid - column), exp(off), Floats{});
      store(at, where(hit, p - splat(1.f), p));
    }
}

// Logits -> their gradient; if dw (V, C) is given, the gradient's product with x is written to it
// for the first piece, and added for the others.
void make_gradients(const Head &head, const HeadRows &all, Piece &piece, int first, int rows,
                    float *dw) {
  const int words = column_words(rows), C = head.C;
  const size_t size = (size_t)words * BLOCKS;
  const Words *x = (const Words *)piece.x.data();
  thread_local std::vector<Line> packed;
  Words *own = (Words *)scratch(packed, size);
#pragma omp for schedule(dynamic)
  for (int panel = 0; panel < panel_count(head.V); ++panel) {
    to_gradients(head, all.targets + first, piece, panel, rows);
    if (!dw) continue;
    const int v = panel * PANEL, height = std::min(PANEL, head.V - v);
    pack_panel(piece.at(0, v), COLUMN_GROUP, own, rows, PANEL);
    transpose_left(own, words);
    for (int k = 0; k < C; k += PANEL)
      multiply_panels(own, x + k / PANEL * size, words, dw + (size_t)v * C + k, C, height, C - k,
                      first > 0);
  }
}

// dx = the logits' gradient times W, summed in one fixed order.
void make_input_gradient(const Head &head, const HeadRows &all, Piece &piece, int first, int rows) {
  const int panels = panel_count(head.C);
  Words *weight = (Words *)piece.weight.data();
  for (int v = 0; v < head.V; v += PACKED_ROWS) {
    const int packed = std::min(PACKED_ROWS, head.V - v), words = (packed + 1) / 2;
    head.pack_columns(v, weight, packed);
#pragma omp for collapse(2) schedule(dynamic)
    for (int begin = 0; begin < rows; begin += ROW_BLOCK)
      for (int panel = 0; panel < panels; ++panel)
        for (int word = 0; word < words; word += CHUNK) {
          const Words *w = weight + ((size_t)panel * words + word) * BLOCKS;
          const int count = std::min(CHUNK, words - word);
          const bool is_first = v + word == 0;
          in_tiles(begin, std::min(begin + ROW_BLOCK, rows), [&](int row, int height) {
            const int32_t *grads = (const int32_t *)piece.at(row, v + 2 * word);
            const auto at = [&](int r, int b) {
              return piece.sum(row + r, panel * PANEL + b * LANES);
            };
            product<Bf16>(
                height, {grads, CHUNK, 1}, w, count,
                [&](int r, int b) { return is_first ? Floats{} : load(at(r, b)); },
                [&](int r, int b, Floats sum) { store(at(r, b), sum); });
          });
        }
  }
#pragma omp for schedule(static)
  for (int row = 0; row < rows; ++row)
    for (int c = 0; c < head.C; c += LANES) {
      uint16_t *to = all.dx + (size_t)(first + row) * head.C + c;
      store(to, load(piece.sum(row, c)), lanes(head.C - c));
    }
}

// The losses of M rows, and the gradients of their sum: dx, and dw (V, C) unless it is nullptr.
void head_pass(const Head &head, const HeadRows &all, float *dw, Piece &piece, int M) {
  const TileUse tiles;
  for (int first = 0; first < M; first += piece.rows) {
    const int rows = std::min(piece.rows, M - first);
    const uint16_t *x = all.x + (size_t)first * head.C;
    if (dw) pack_panels(x, (Words *)piece.x.data(), rows, head.C);
    make_logits(head, x, piece, rows);
    make_losses(head, all, piece, first, rows);
    make_gradients(head, all, piece, first, rows, dw);
    make_input_gradient(head, all, piece, first, rows);
  }
}

}  // namespace
