#include "check.h"
#include "norm_train.h"

struct Row {
  double mean = 0, deviation = 0;

  Row(const float *x, int C, double eps) {
    for (int i = 0; i < C; ++i) mean += x[i] / C;
    for (int i = 0; i < C; ++i) deviation += (x[i] - mean) * (x[i] - mean) / C;
    deviation = std::sqrt(deviation + eps);
  }
};

TEST(rows_of_fp32_and_of_bf16_are_normalised) {
  for (const int C : {1, 15, 16, 70}) {
    const auto halves = bf16(randoms(C, C));
    std::vector<float> x, y(C), weight = randoms(C, 1), bias = randoms(C, 2);
    for (const uint16_t half : halves) x.push_back(from_bf16(half));
    std::vector<uint16_t> y_halves(C);
    normalise(x.data(), weight.data(), bias.data(), y.data(), 1e-5f, C);
    normalise_rows(halves.data(), weight.data(), bias.data(), y_halves.data(), 1e-5f, 1, C);
    const Row row(x.data(), C, 1e-5);
    for (int i = 0; i < C; ++i) {
      const double exact = (x[i] - row.mean) / row.deviation * weight[i] + bias[i];
      CHECK_CLOSE(y[i], exact, 1e-5);
      CHECK(y_halves[i] == bf16(y[i]));
    }
  }
}

TEST(gradients_are_those_of_the_formula) {
  const int M = 70, C = 37;
  const auto dy = bf16(randoms(M * C, 1)), x = bf16(randoms(M * C, 2));
  const std::vector<float> weight = randoms(C, 3);
  std::vector<uint16_t> dx(M * C);
  std::vector<float> dweight(C), dbias(C), sums(NORM_PARTS * 2 * C);
#pragma omp parallel num_threads(2)
  norm_gradients(dy.data(), x.data(), weight.data(), dx.data(), dweight.data(), dbias.data(),
                 sums.data(), 1e-5f, M, C);
  std::vector<double> exact_weight(C), exact_bias(C);
  for (int m = 0; m < M; ++m) {
    std::vector<float> numbers(C);
    std::vector<double> n(C), g(C);
    for (int i = 0; i < C; ++i) numbers[i] = from_bf16(x[m * C + i]);
    const Row row(numbers.data(), C, 1e-5);
    double mean = 0, along = 0;
    for (int i = 0; i < C; ++i) {
      n[i] = (numbers[i] - row.mean) / row.deviation;
      g[i] = (double)from_bf16(dy[m * C + i]) * weight[i];
      mean += g[i] / C, along += g[i] * n[i] / C;
      exact_weight[i] += from_bf16(dy[m * C + i]) * n[i];
      exact_bias[i] += from_bf16(dy[m * C + i]);
    }
    for (int i = 0; i < C; ++i) {
      const double exact = (g[i] - mean - n[i] * along) / row.deviation;
      CHECK_CLOSE(from_bf16(dx[m * C + i]), exact, 0.004 * std::fabs(exact) + 1e-4);
    }
  }
  for (int i = 0; i < C; ++i) {
    CHECK_CLOSE(dweight[i], exact_weight[i], 1e-4);
    CHECK_CLOSE(dbias[i], exact_bias[i], 1e-4);
  }
}
