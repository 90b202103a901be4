#include "check.h"
#include "linear_train.h"

struct Layer {
  int M, N, K;
  std::vector<uint16_t> x;
  std::vector<float> weight, bias;
  std::vector<Line> panels;

  Layer(int M, int N, int K)
      : M(M),
        N(N),
        K(K),
        x(bf16(randoms((size_t)M * K, 1))),
        bias(randoms(N, 3)),
        panels((size_t)panel_count(N) * BLOCKS * K / 2) {
    for (const float w : randoms((size_t)N * K, 2)) weight.push_back(from_bf16(bf16(w)));
    pack_rows(weight.data(), (Words *)panels.data(), N, K);
  }
  double sum(int m, int n) const {
    double sum = 0;
    for (int k = 0; k < K; ++k) sum += (double)from_bf16(x[m * K + k]) * weight[n * K + k];
    return sum;
  }
  template <typename To>
  void run(To to) const {
#pragma omp parallel num_threads(2)
    multiply((const int32_t *)x.data(), (const Words *)panels.data(), M, K / 2, to);
  }
};

TEST(a_layer_is_a_loop_with_its_bias_or_without) {
  for (const int M : {1, 7, 100})
    for (const int N : {2, 64, 98}) {
      const Layer layer(M, N, 34);
      std::vector<uint16_t> with(M * N), without(M * N);
      layer.run(Output{with.data(), N, layer.bias.data()});
      layer.run(Output{without.data(), N, nullptr});
      for (int m = 0; m < M; ++m)
        for (int n = 0; n < N; ++n) {
          const double sum = layer.sum(m, n), off = 0.004 * (std::fabs(sum) + 3);
          CHECK_CLOSE(from_bf16(with[m * N + n]), sum + layer.bias[n], off);
          CHECK_CLOSE(from_bf16(without[m * N + n]), sum, off);
        }
    }
}

TEST(results_are_multiplied_by_a_slope_or_go_through_gelu) {
  const int M = 13, N = 70;
  const Layer layer(M, N, 10);
  const auto slopes = bf16(randoms(M * N, 5));
  std::vector<uint16_t> sloped(M * N), value(M * N), slope(M * N);
  const float *bias = layer.bias.data();
  layer.run(Sloped{{sloped.data(), N, bias}, slopes.data()});
  layer.run(WithSlope<gelu_and_slope>{{{value.data(), N, bias}, slope.data(), {}}});
  end_streams();
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) {
      const double z = layer.sum(m, n) + layer.bias[n];
      const double product = z * from_bf16(slopes[m * N + n]);
      CHECK_CLOSE(from_bf16(sloped[m * N + n]), product, 0.004 * std::fabs(product) + 1e-4);
      CHECK_CLOSE(from_bf16(value[m * N + n]), scalar_gelu(z), 0.004 * std::fabs(z) + 5e-4);
      const double exact = (scalar_gelu(z + 1e-5) - scalar_gelu(z - 1e-5)) / 2e-5;
      CHECK_CLOSE(from_bf16(slope[m * N + n]), exact, 0.006);
    }
}

TEST(gates_and_inputs_meet_in_a_panel) {
  for (const int N : {6, 32, 70}) {
    const int M = 13;
    Layer layer(M, 2 * N, 10);
    layer.panels.resize((size_t)gated_panel_count(N) * PANEL * BLOCKS * layer.K);
    pack_gated_rows(layer.weight.data(), (Words *)layer.panels.data(), N, layer.K);
    for (const bool has_bias : {true, false}) {
      std::vector<uint16_t> value(M * N), slopes(M * 2 * N);
      const float *bias = has_bias ? layer.bias.data() : nullptr;
      layer.run(WithGates<swiglu>{{{value.data(), N, bias}, slopes.data(), {}}});
      end_streams();
      for (int m = 0; m < M; ++m)
        for (int n = 0; n < N; ++n) {
          const double gate = layer.sum(m, n) + (has_bias ? layer.bias[n] : 0);
          const double input = layer.sum(m, N + n) + (has_bias ? layer.bias[N + n] : 0);
          const double s = 1 / (1 + std::exp(-gate)), slope = s + gate * s * (1 - s);
          const auto near = [](uint16_t ours, double exact) {
            CHECK_CLOSE(from_bf16(ours), exact, 0.005 * std::fabs(exact) + 5e-4);
          };
          near(value[m * N + n], gate * s * input);
          near(slopes[m * 2 * N + n], slope * input);
          near(slopes[m * 2 * N + N + n], gate * s);
        }
    }
  }
}

TEST(a_result_is_multiplied_by_two_slopes) {
  const int M = 13, N = 70;
  const Layer layer(M, N, 10);
  const auto slopes = bf16(randoms(M * 2 * N, 5));
  std::vector<uint16_t> y(M * 2 * N);
  layer.run(Gates{{y.data(), N, nullptr}, slopes.data()});
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < 2 * N; ++n) {
      const double exact = layer.sum(m, n % N) * from_bf16(slopes[m * 2 * N + n]);
      CHECK_CLOSE(from_bf16(y[m * 2 * N + n]), exact, 0.004 * std::fabs(exact) + 1e-4);
    }
}

TEST(gradients_of_weight_and_bias_are_sums_over_rows) {
  for (const int M : {1, 33, 600})  // beyond 512 rows they are summed in parts
    for (const auto &[N, K] : {std::pair{66, 10}, std::pair{10, 130}}) {
      const auto dy = bf16(randoms((size_t)M * N, 1)), x = bf16(randoms((size_t)M * K, 2));
      std::vector<float> dw(N * K), db(N);
      std::vector<Line> work((size_t)panel_count(std::min(N, K)) * BLOCKS * column_words(M));
#pragma omp parallel num_threads(2)
      weight_gradient(dy.data(), x.data(), dw.data(), db.data(), (Words *)work.data(), M, N, K);
      for (int n = 0; n < N; ++n) {
        double bias = 0;
        for (int m = 0; m < M; ++m) bias += from_bf16(dy[m * N + n]);
        CHECK_CLOSE(db[n], bias, 1e-3);
        for (int k = 0; k < K; ++k) {
          double sum = 0;
          for (int m = 0; m < M; ++m)
            sum += (double)from_bf16(dy[m * N + n]) * from_bf16(x[m * K + k]);
          CHECK_CLOSE(dw[n * K + k], sum, 1e-3);
        }
      }
    }
}
