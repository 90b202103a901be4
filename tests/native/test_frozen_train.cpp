#include "check.h"
#include "frozen_train.h"

TEST(a_narrow_product_is_a_loop) {
  for (const int M : {1, 11, 12, 50})
    for (const int N : {2, 16, 20, 32, 40}) {
      const int K = 34;
      const auto x = bf16(randoms(M * K, 1)), w = bf16(randoms(N * K, 2));
      std::vector<Line> panels((size_t)panel_count(N) * BLOCKS * K / 2);
      std::vector<uint16_t> y(M * N);
#pragma omp parallel num_threads(2)
      {
        pack_rows(w.data(), (Words *)panels.data(), N, K);
        multiply_any(x.data(), (Words *)panels.data(), M, K / 2, Output{y.data(), N, nullptr});
      }
      for (int m = 0; m < M; ++m)
        for (int n = 0; n < N; ++n) {
          double sum = 0;
          for (int k = 0; k < K; ++k)
            sum += (double)from_bf16(x[m * K + k]) * from_bf16(w[n * K + k]);
          CHECK_CLOSE(from_bf16(y[m * N + n]), sum, 0.004 * (std::fabs(sum) + 3));
        }
    }
}

TEST(a_gradient_has_what_an_adapter_adds_times_its_mask) {
  const int M = 13, N = 10, K = 70, R = 4;
  const auto dy = bf16(randoms(M * N, 1)), w = bf16(randoms(N * K, 2));
  const auto du = bf16(randoms(M * R, 3)), mask = bf16(randoms(M * K, 4));
  std::vector<float> down;
  for (const float a : randoms(R * K, 5)) down.push_back(from_bf16(bf16(a)));
  std::vector<Line> panels((size_t)panel_count(K) * BLOCKS * (N + R) / 2);
  std::vector<uint16_t> dx(M * K);
#pragma omp parallel num_threads(2)
  frozen_gradient(dy.data(), w.data(), {du.data(), down.data(), R, mask.data()}, nullptr, dx.data(),
                  (Words *)panels.data(), M, N, K, NONE);
  for (int m = 0; m < M; ++m)
    for (int k = 0; k < K; ++k) {
      double sum = 0, added = 0;
      for (int n = 0; n < N; ++n) sum += (double)from_bf16(dy[m * N + n]) * from_bf16(w[n * K + k]);
      for (int r = 0; r < R; ++r) added += (double)from_bf16(du[m * R + r]) * down[r * K + k];
      sum += added * from_bf16(mask[m * K + k]);
      CHECK_CLOSE(from_bf16(dx[m * K + k]), sum, 0.004 * (std::fabs(sum) + 3));
    }
}
