#include "check.h"
#include "linear_decode.h"

static Team team(2), alone(1);

// Weights (outputs, inputs) as the decoder packs them in Python: [panel][word][64 outputs].
struct Packed {
  Linear linear = {};
  std::vector<float> weight, bias, scale;
  std::vector<int32_t> words;
  std::vector<PanelGroup> groups;

  Packed(int inputs, int outputs, int kind) : weight(randoms(inputs * outputs, 1)) {
    bias = randoms(outputs, 2), scale.resize(outputs, 1);
    linear.inputs = inputs, linear.outputs = outputs, linear.kind = kind;
    linear.bias = bias.data();
    if (kind == INT4) {
      pack_groups();
      return;
    }
    const int per_word = kind == INT8 ? 4 : kind == BF16 ? 2 : 1, count = word_count(linear);
    words.resize((size_t)panel_count(outputs) * count * PANEL);
    for (int o = 0; o < outputs; ++o) {
      float most = 0;
      for (int i = 0; i < inputs; ++i) most = std::max(most, std::fabs(weight[o * inputs + i]));
      if (kind == INT8) scale[o] = most / 127;
      for (int i = 0; i < inputs; ++i) {
        float &w = weight[o * inputs + i];
        const size_t at = ((size_t)(o / PANEL) * count + i / per_word) * PANEL + o % PANEL;
        char *to = (char *)&words[at] + i % per_word * (4 / per_word);
        const int8_t whole = kind == INT8 ? (int8_t)std::nearbyint(w / scale[o]) : 0;
        const uint16_t half = bf16(w);
        if (kind == INT8) *to = whole + 128, w = whole * scale[o];
        if (kind == BF16) std::memcpy(to, &half, 2), w = from_bf16(half);
        if (kind == FP32) std::memcpy(to, &w, 4);
      }
    }
    linear.weight = words.data();
    if (kind == INT8) linear.scale = scale.data();
    pair_words(linear);
  }

  void pack_groups() {
    const int count = group_count(linear.inputs, GROUP);
    groups.resize((size_t)panel_count(linear.outputs) * count);
    for (int o = 0; o < linear.outputs; ++o)
      for (int g = 0; g < count; ++g) {
        PanelGroup &group = groups[(size_t)(o / PANEL) * count + g];
        const int from = g * GROUP, stop = std::min(from + GROUP, linear.inputs);
        float most = 0, *row = &weight[o * linear.inputs];
        for (int i = from; i < stop; ++i) most = std::max(most, std::fabs(row[i]));
        const uint16_t half = fp16(most / 7);
        const float scale = from_fp16(half);
        group.scales[o % PANEL] = half;
        for (int i = from; i < from + GROUP; ++i) {
          const int whole = i < stop ? std::lrint(row[i] / scale) : 0;
          if (i < stop) row[i] = whole * scale;
          const int word = (i - from) / 4, at = o % LANES * 4 + i % 4;
          uint8_t &both = group.values[word % (HALF_WORDS)][o % PANEL / LANES][at];
          both |= (whole + 8) << (word < HALF_WORDS ? 0 : 4);
        }
      }
    linear.weight = groups.data();
  }
};

TEST(an_outputs_weights_are_read_from_its_panel) {
  for (const int kind : {FP32, BF16})
    for (const auto &[inputs, outputs] : {std::pair{1, 3}, std::pair{37, 130}}) {
      const Packed packed(inputs, outputs, kind);
      for (int o = 0; o < outputs; ++o) {
        std::vector<float> row(inputs);
        read_row(packed.linear, o, row.data());
        for (int i = 0; i < inputs; ++i) CHECK(row[i] == packed.weight[o * inputs + i]);
      }
    }
}

TEST(a_layer_is_a_loop_with_norm_and_gelu_and_residual) {
  for (const int kind : {FP32, BF16, INT8, INT4})
    for (const int rows : {1, 5, 100})
      for (const auto &[inputs, outputs] :
           {std::pair{1, 3}, std::pair{37, 130}, std::pair{300, 65}}) {
        const Packed packed(inputs, outputs, kind);
        const std::vector<float> x = randoms(rows * inputs, 3), ones(inputs, 1), none(inputs);
        const std::vector<float> add = randoms(rows * outputs, 4);
        std::vector<float> y(rows * outputs);
        std::vector<int32_t> words(rows * row_words(packed.linear));
        Step step = {};
        step.words = words.data();
        const Norm norm = {ones.data(), none.data(), 1e-5f};
#pragma omp parallel num_threads(2)
        linear(team, packed.linear, step, x.data(), &norm, nullptr, rows,
               {y.data(), add.data(), outputs, GELU_TANH});
        const double off = kind == FP32 ? 1e-5 : kind == BF16 ? 0.02 : 0.06;
        std::vector<float> normed(inputs);
        for (int r = 0; r < rows; ++r) {
          normalise(&x[r * inputs], ones.data(), none.data(), normed.data(), 1e-5f, inputs);
          for (int o = 0; o < outputs; ++o) {
            double sum = packed.bias[o];
            for (int i = 0; i < inputs; ++i)
              sum += (double)normed[i] * packed.weight[o * inputs + i];
            CHECK_CLOSE(y[r * outputs + o], scalar_gelu(sum) + add[r * outputs + o],
                        off * std::sqrt((double)inputs));
          }
        }
      }
}

TEST(gates_let_through_what_stands_half_a_panel_on) {
  for (const int kind : {FP32, BF16, INT8, INT4})
    for (const int inner : {1, 31, 70}) {
      const Activation activation = inner == 31 ? GEGLU : SWIGLU;
      const int rows = 7, inputs = 37, half = PANEL / 2;
      const Packed packed(inputs, (inner + half - 1) / half * PANEL, kind);
      const std::vector<float> x = randoms(rows * inputs, 3), ones(inputs, 1);
      std::vector<float> y(rows * inner), normed(inputs);
      std::vector<int32_t> words(rows * row_words(packed.linear));
      Step step = {};
      step.words = words.data();
      const Norm norm = {ones.data(), nullptr, 1e-5f};
#pragma omp parallel num_threads(2)
      linear(team, packed.linear, step, x.data(), &norm, nullptr, rows,
             {y.data(), nullptr, inner, activation});
      const double off = kind == FP32 ? 1e-4 : kind == BF16 ? 0.1 : 0.3;
      for (int r = 0; r < rows; ++r) {
        normalise<float>(&x[r * inputs], ones.data(), nullptr, normed.data(), 1e-5f, inputs);
        const auto sum = [&](int o) {
          double sum = packed.bias[o];
          for (int i = 0; i < inputs; ++i) sum += (double)normed[i] * packed.weight[o * inputs + i];
          return sum;
        };
        for (int i = 0; i < inner; ++i) {
          const int column = i / half * PANEL + i % half;
          const double gate = sum(column), other = sum(column + half);
          const double silu = gate / (1 + std::exp(-gate));
          const double exact = (activation == GEGLU ? scalar_gelu(gate) : silu) * other;
          CHECK_CLOSE(y[r * inner + i], exact, off * (1 + std::fabs(gate) + std::fabs(other)));
        }
      }
    }
}

TEST(a_row_has_the_same_bits_among_any_neighbours) {
  for (const int kind : {FP32, BF16, INT8, INT4}) {
    const int rows = 110, inputs = 37, outputs = 70;
    const Packed packed(inputs, outputs, kind);
    const std::vector<float> x = randoms(rows * inputs, 3);
    std::vector<float> all(rows * outputs), one(outputs);
    std::vector<int32_t> words(rows * row_words(packed.linear));
    Step step = {};
    step.words = words.data();
    linear(alone, packed.linear, step, x.data(), nullptr, nullptr, rows,
           {all.data(), nullptr, outputs});
    for (const int32_t row : {0, 50, 109}) {
      linear(alone, packed.linear, step, x.data(), nullptr, &row, 1,
             {one.data(), nullptr, outputs});
      CHECK(!std::memcmp(one.data(), &all[row * outputs], outputs * sizeof(float)));
    }
  }
}

TEST(rows_of_adapters_get_their_products_too) {
  for (const int kind : {FP32, BF16, INT8, INT4})
    for (const int rows : {3, 20}) {
      const int inputs = 37, outputs = 130, padded = 48, most = 8;
      Packed packed(inputs, outputs, kind);
      packed.linear.number = 1;
      const std::vector<float> x = randoms(rows * inputs, 3);
      std::vector<float> plain(rows * outputs), y(rows * outputs);
      std::vector<float> narrow(rows * most);
      std::vector<int32_t> words(rows * row_words(packed.linear));
      // Ranks 4 and 8; their A as [rank / 4][inputs / 16][4][16], B as [panel][rank][64].
      std::vector<float> a[2], b[2];
      LowRank layers[2][3] = {};
      for (int one = 0; one < 2; ++one) {
        const int rank = 4 * (one + 1);
        a[one] = randoms(rank * padded, 5 + one), b[one] = randoms(rank * 3 * PANEL, 7 + one);
        layers[one][1] = {a[one].data(), b[one].data(), rank, FP32, padded};
      }
      std::vector<const LowRank *> each(rows);
      for (int r = 0; r < rows; ++r) each[r] = r % 3 < 2 ? layers[r % 3] : nullptr;
      Step step = {};
      step.words = words.data(), step.narrow = narrow.data();
      step.most_rank = most;
      linear(alone, packed.linear, step, x.data(), nullptr, nullptr, rows,
             {plain.data(), nullptr, outputs});
      step.adapters = each.data();
#pragma omp parallel num_threads(2)
      linear(team, packed.linear, step, x.data(), nullptr, nullptr, rows,
             {y.data(), nullptr, outputs});
      for (int r = 0; r < rows; ++r)
        for (int o = 0; o < outputs; ++o) {
          double sum = plain[r * outputs + o];
          const int one = r % 3, rank = 4 * (one + 1);
          for (int k = 0; one < 2 && k < rank; ++k) {
            double product = 0;
            for (int i = 0; i < inputs; ++i)
              product += (double)x[r * inputs + i] *
                         a[one][((k / 4 * padded / 16 + i / 16) * 4 + k % 4) * 16 + i % 16];
            sum += product * b[one][(o / PANEL * rank + k) * PANEL + o % PANEL];
          }
          CHECK_CLOSE(y[r * outputs + o], sum, 1e-4);
        }
    }
}
