#include "check.h"
#include "head_loss.h"

// Rows through a head by scalar loops.
struct Loop {
  int M, V, C, valid;
  std::vector<uint16_t> x;
  std::vector<float> weight;
  std::vector<int64_t> targets;

  Loop(int M, int V, int C, int valid)
      : M(M), V(V), C(C), valid(valid), x(bf16(randoms((size_t)M * C, 1))) {
    for (const float w : randoms((size_t)V * C, 2)) weight.push_back(from_bf16(bf16(w)));
    for (int m = 0; m < M; ++m) targets.push_back(m % 3 ? (m * 7) % valid : valid - 1);
  }
  double logit(int m, int v) const {
    double sum = 0;
    for (int c = 0; c < C; ++c) sum += (double)from_bf16(x[m * C + c]) * weight[v * C + c];
    return from_bf16(bf16(sum));
  }
  double log_sum(int m) const {
    double sum = 0;
    for (int v = 0; v < valid; ++v) sum += std::exp(logit(m, v));
    return std::log(sum);
  }
  // The gradient by each logit, (M, V).
  std::vector<double> slopes() const {
    std::vector<double> slopes(M * V);
    for (int m = 0; m < M; ++m) {
      const double sum = log_sum(m);
      for (int v = 0; v < valid; ++v)
        slopes[m * V + v] = std::exp(logit(m, v) - sum) - (v == targets[m]);
    }
    return slopes;
  }
};

struct Results {
  std::vector<float> losses, dw;
  std::vector<uint16_t> dx;

  Results(const Loop &loop, int rows, bool has_dw)
      : losses(loop.M), dw(has_dw ? loop.V * loop.C : 0), dx(loop.M * loop.C) {
    const Head head = {loop.weight.data(), loop.V, loop.C, loop.valid};
    Piece piece;
    piece.fit(head, rows);
#pragma omp parallel num_threads(2)
    head_pass(head, {loop.x.data(), loop.targets.data(), losses.data(), dx.data()},
              has_dw ? dw.data() : nullptr, piece, loop.M);
  }
};

TEST(losses_and_gradients_are_those_of_a_loop_whatever_the_pieces) {
  for (const auto &[V, valid] : {std::pair{5, 5}, std::pair{70, 66}, std::pair{2101, 2100}}) {
    const Loop loop(13, V, 10, valid);
    const std::vector<double> slopes = loop.slopes();
    for (const int rows : {13, 7, 1}) {
      const Results ours(loop, rows, true);
      for (int m = 0; m < loop.M; ++m) {
        const double loss = loop.log_sum(m) - loop.logit(m, loop.targets[m]);
        CHECK_CLOSE(ours.losses[m], loss, 1e-2 * (1 + loss));
        for (int c = 0; c < loop.C; ++c) {
          double sum = 0;
          for (int v = 0; v < V; ++v) sum += slopes[m * V + v] * loop.weight[v * loop.C + c];
          CHECK_CLOSE(from_bf16(ours.dx[m * loop.C + c]), sum, 2e-2 * (1 + std::fabs(sum)));
        }
      }
      for (int v = 0; v < V; ++v)
        for (int c = 0; c < loop.C; ++c) {
          double sum = 0;
          for (int m = 0; m < loop.M; ++m)
            sum += slopes[m * V + v] * from_bf16(loop.x[m * loop.C + c]);
          CHECK_CLOSE(ours.dw[v * loop.C + c], sum, 2e-2 * (1 + std::fabs(sum)));
        }
    }
  }
}

TEST(a_frozen_head_gives_the_same_losses_and_input_gradient) {
  const Loop loop(13, 70, 10, 66);
  const Results whole(loop, 5, true), frozen(loop, 5, false);
  CHECK(whole.losses == frozen.losses && whole.dx == frozen.dx);
}

TEST(pieces_are_alike_and_never_larger_than_their_room) {
  for (const int M : {1, 100, 1000, 4096})
    for (const int V : {2, 65, 49152, 1 << 24, 1 << 27}) {
      const int rows = piece_rows(M, V);
      CHECK(rows >= 1 && rows <= M);
      CHECK(rows == 1 || (size_t)rows * V * 2 <= PIECE_BYTES);
      const int pieces = (M + rows - 1) / rows;
      CHECK((M + pieces - 1) / pieces == rows);
    }
}
