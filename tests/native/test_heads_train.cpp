#include "check.h"
#include "heads_train.h"

// A row of queries or keys as they meet, in double precision.
static std::vector<double> prepare(const Preparation &how, const std::vector<double> &x, int t) {
  const int D = x.size();
  std::vector<double> y = x;
  double square = 0;
  for (const double one : x) square += one * one / D;
  for (int i = 0; i < D && how.weight; ++i)
    y[i] = x[i] / std::sqrt(square + how.eps) * how.weight[i];
  for (int i = 0; i < how.half; ++i) {
    const double cos = from_bf16(how.cosines[t * how.half + i]);
    const double sin = from_bf16(how.sines[t * how.half + i]);
    const double first = y[i], second = y[how.half + i];
    y[i] = first * cos - second * sin, y[how.half + i] = second * cos + first * sin;
  }
  return y;
}

TEST(rows_are_normalised_and_rotated_and_their_gradients_are_slopes) {
  const int T = 5, D = 40;
  const auto x = bf16(randoms(T * D, 1)), grad = bf16(randoms(T * D, 2));
  const auto cosines = bf16(randoms(T * D, 3)), sines = bf16(randoms(T * D, 4));
  const std::vector<float> weight = randoms(D, 5);
  for (const int half : {0, 3, 20})
    for (const bool is_normed : {false, true}) {
      const Preparation how = {is_normed ? weight.data() : nullptr, 1e-5f, cosines.data(),
                               sines.data(), half};
      const From rows = {x.data(), (size_t)D};
      std::vector<uint16_t> memory, before = grad, dx(T * D);
      std::vector<float> dweight(D);
      const From ready = prepared(how, rows, {T, D}, memory);
      CHECK(how.is_identity() == (ready.first == rows.first));
      if (how.is_identity()) continue;
      write_prepared(how, {before.data(), (size_t)D}, rows, {T, D}, {dx.data(), (size_t)D},
                     dweight.data());
      std::vector<double> exact_weight(D);
      for (int t = 0; t < T; ++t) {
        std::vector<double> row;
        for (int i = 0; i < D; ++i) row.push_back(from_bf16(x[t * D + i]));
        const auto y = prepare(how, row, t);
        for (int i = 0; i < D; ++i) {
          CHECK_CLOSE(from_bf16(ready.row(t)[i]), y[i], 0.008 * std::fabs(y[i]) + 0.03);
          auto higher = row, lower = row;
          higher[i] += 1e-4, lower[i] -= 1e-4;
          const auto above = prepare(how, higher, t), below = prepare(how, lower, t);
          double slope = 0;
          for (int j = 0; j < D; ++j)
            slope += from_bf16(grad[t * D + j]) * (above[j] - below[j]) / 2e-4;
          CHECK_CLOSE(from_bf16(dx[t * D + i]), slope, 0.008 * std::fabs(slope) + 0.06);
        }
        for (int i = 0; i < D && is_normed; ++i) {
          Preparation more = how, less = how;
          std::vector<float> high = weight, low = weight;
          high[i] += 0.5f, low[i] -= 0.5f;
          more.weight = high.data(), less.weight = low.data();
          const auto above = prepare(more, row, t), below = prepare(less, row, t);
          for (int j = 0; j < D; ++j)
            exact_weight[i] += from_bf16(grad[t * D + j]) * (above[j] - below[j]);
        }
      }
      for (int i = 0; i < D; ++i) CHECK_CLOSE(dweight[i], exact_weight[i], 0.1);
    }
}

TEST(heads_that_share_keys_are_heads_with_copies_of_them) {
  const int T = 70, H = 6, K = 2, D = 10, half = 3, B = 2;
  const Heads shared = {T, H, K, D}, own = {T, H, H, D};
  const auto grad = bf16(randoms(B * T * H * D, 1));
  const auto cosines = bf16(randoms(T * half, 3)), sines = bf16(randoms(T * half, 4));
  const std::vector<float> weight = randoms(D, 5);
  const Preparation how = {weight.data(), 1e-5f, cosines.data(), sines.data(), half};
  const auto qkv = bf16(randoms(B * T * shared.stride(), 2));
  std::vector<uint16_t> copied(B * T * own.stride());
  const auto copy_of = [&](int head) {  // of the second
    return head < H ? head : H + (head - H) / shared.group();
  };
  for (int row = 0; row < B * T; ++row)
    for (int head = 0; head < 3 * H; ++head)
      for (int i = 0; i < D; ++i)
        copied[row * own.stride() + head * D + i] =
            qkv[row * shared.stride() + copy_of(head) * D + i];
  const auto backward = [&](const Heads &heads, const std::vector<uint16_t> &qkv) {
    std::vector<uint16_t> out(B * T * H * D), dqkv(qkv.size());
    std::vector<float> log_sums(B * H * T), dweights(2 * D);
    for (int b = 0; b < B; ++b)
      for (int h = 0; h < H; ++h)
        attend_head(heads, how, how, qkv.data(), out.data(), log_sums.data(), b, h);
    const Pass pass = {grad.data(), qkv.data(), out.data(), log_sums.data(), dqkv.data()};
    for (int b = 0; b < B; ++b)
      for (int g = 0; g < heads.K; ++g)
        group_gradient(heads, how, how, pass, dweights.data(), b, g);
    std::vector<float> numbers(dweights);
    for (const uint16_t one : out) numbers.push_back(from_bf16(one));
    return std::pair{numbers, dqkv};
  };
  const auto [found, dqkv] = backward(shared, qkv);
  const auto [with_copies, dcopied] = backward(own, copied);
  for (size_t i = 0; i < found.size(); ++i)
    CHECK_CLOSE(found[i], with_copies[i], i < 2 * D ? 0.02 * std::fabs(with_copies[i]) + 0.5 : 0);
  for (int row = 0; row < B * T; ++row)
    for (int head = 0; head < H + 2 * K; ++head)
      for (int i = 0; i < D; ++i) {
        double sum = 0;
        for (int copy = 0; copy < 3 * H; ++copy)
          if (copy_of(copy) == head) sum += from_bf16(dcopied[row * own.stride() + copy * D + i]);
        CHECK_CLOSE(from_bf16(dqkv[row * shared.stride() + head * D + i]), sum,
                    0.03 * std::fabs(sum) + 0.03);
      }
}
