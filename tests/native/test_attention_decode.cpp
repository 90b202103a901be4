#include "attention_decode.h"
#include "check.h"

template <typename T>
static float number(T kept) {
  if constexpr (sizeof(T) == 2) return from_bf16(kept);
  return kept;
}

// What a step's attention has of choices: heads, kept heads, window, rotated part, norm of q and k.
struct Choice {
  int H, K, window, rotary;
  bool is_normed;
};

// A head as a scalar loop makes it ready.
static std::vector<double> prepared(const float *head, int E, const Choice &choice,
                                    const std::vector<float> &weight, int position) {
  std::vector<double> out(head, head + E);
  if (choice.is_normed) {
    double square = 1e-5;
    for (const double x : out) square += x * x / E;
    for (int e = 0; e < E; ++e) out[e] *= weight[e] / std::sqrt(square);
  }
  const int half = choice.rotary / 2;
  for (int i = 0; i < half; ++i) {
    const double angle = position * (0.3 + i), first = out[i], second = out[half + i];
    out[i] = first * std::cos(angle) - second * std::sin(angle);
    out[half + i] = second * std::cos(angle) + first * std::sin(angle);
  }
  return out;
}

// A step of three rows: two follow `before` tokens that were kept in slot 1, if they are not apart.
template <typename T>
static void check_a_step(int before, int E, const Choice &choice, bool apart, double off) {
  const auto [H, K, window, rotary, is_normed] = choice;
  const int length = before + 3, half = rotary / 2, width = (H + 2 * K) * E, rows = 3;
  std::vector<float> wide = randoms(rows * width, E), attended(rows * H * E);
  const std::vector<float> given = wide, q_weight = randoms(E, 5), k_weight = randoms(E, 6);
  std::vector<T> keys((size_t)rows * K * length * E), values(keys.size());
  const std::vector<float> kept = randoms(2 * keys.size(), before);
  for (size_t i = 0; i < keys.size(); ++i) {
    keys[i] = sizeof(T) == 2 ? bf16(kept[2 * i]) : kept[2 * i];
    values[i] = sizeof(T) == 2 ? bf16(kept[2 * i + 1]) : kept[2 * i + 1];
  }
  std::vector<float> cos(length * half), sin(length * half);
  for (int t = 0; t < length; ++t)
    for (int i = 0; i < half; ++i) {
      cos[t * half + i] = std::cos(t * (0.3 + i)), sin[t * half + i] = std::sin(t * (0.3 + i));
    }
  const int32_t slots[] = {1, apart ? 2 : 1, 0}, positions[] = {before, before + 1, 0};
  void *key_layers[] = {keys.data()}, *value_layers[] = {values.data()};
  const Cache cache = {key_layers, value_layers, length, sizeof(T) == 2 ? BF16 : FP32};
  Block block = {};
  block.window = window, block.rotary = rotary;
  if (is_normed) {
    block.q_norm = {q_weight.data(), nullptr, 1e-5f};
    block.k_norm = {k_weight.data(), nullptr, 1e-5f};
  }
  Model model = {};
  model.blocks = &block, block.cos = cos.data(), block.sin = sin.data();
  model.n_head = H, model.kv_heads = K, model.head_width = E;
  Team team(2);
  Step step = {};
  step.slots = slots, step.positions = positions, step.rows = rows, step.apart = apart;
  step.wide = wide.data(), step.attended = attended.data();
#pragma omp parallel num_threads(2)
  attention<T>(team, model, step, cache, 0);
  for (int row = 0; row < rows; ++row)
    for (int h = 0; h < H; ++h) {
      const int group = h / (H / K), position = positions[row];
      const float *own = &given[row * width];
      const auto q = prepared(own + h * E, E, choice, q_weight, position);
      const auto k = prepared(own + (H + group) * E, E, choice, k_weight, position);
      const size_t first = ((size_t)slots[row] * K + group) * length * E;
      for (int e = 0; e < E; ++e) {
        const size_t at = first + (size_t)position * E + e;
        CHECK_CLOSE(number(keys[at]), k[e], off * (1 + std::fabs(k[e])));
        CHECK_CLOSE(number(values[at]), own[(H + K + group) * E + e], off * 4);
      }
      std::vector<double> scores, out(E);
      double total = 0, most = -1e30;
      const int start = std::max(0, position + 1 - window);
      for (int t = start; t <= position; ++t) {
        double score = 0;
        for (int e = 0; e < E; ++e) score += q[e] * number(keys[first + t * E + e]);
        scores.push_back(score), most = std::max(most, score);
      }
      for (int t = start; t <= position; ++t) {
        const double weight = std::exp(scores[t - start] - most);
        total += weight;
        for (int e = 0; e < E; ++e) out[e] += weight * number(values[first + t * E + e]);
      }
      for (int e = 0; e < E; ++e)
        CHECK_CLOSE(attended[(row * H + h) * E + e], out[e] / total, 2e-4);
    }
}

static void check_steps(const std::vector<int> &widths, const Choice &choice) {
  for (const int before : {0, 1, 15, 16, 40})
    for (const int E : widths)
      for (const bool apart : {true, false}) {
        check_a_step<float>(before, E, choice, apart, 1e-5);
        check_a_step<uint16_t>(before, E, choice, apart, 0.005);
      }
}

TEST(a_step_keeps_its_keys_and_values_and_attends_to_all_up_to_its_own) {
  check_steps({1, 9, 16, 70}, {2, 2, 100, 0, false});
}

TEST(heads_of_a_group_share_keys_and_values) {
  for (const int G : {2, 3, 4, 7}) check_steps({9, 64}, {2 * G, 2, 100, 0, false});
}

TEST(a_window_hides_what_lies_before_it) {
  for (const int window : {1, 7, 17}) check_steps({9}, {6, 2, window, 0, false});
}

TEST(queries_and_keys_are_normalised_and_their_first_numbers_rotated) {
  for (const int rotary : {0, 2, 34, 70}) check_steps({70}, {3, 1, 100, rotary, true});
  check_steps({10}, {2, 2, 100, 6, false});
}
