#include "attention_decode.h"
#include "check.h"

template <typename T>
static float number(T kept) {
  if constexpr (sizeof(T) == 2) return from_bf16(kept);
  return kept;
}

// A step of two rows, of which one follows `before` tokens that were kept, in two heads.
template <typename T>
static void check_a_step(int before, int E, int kind, double off) {
  const int H = 2, C = H * E, length = before + 3;
  std::vector<float> wide = randoms(2 * 3 * C, E), attended(2 * C);
  std::vector<T> keys((size_t)2 * H * length * E), values(keys.size());
  const std::vector<float> kept = randoms(2 * keys.size(), before);
  for (size_t i = 0; i < keys.size(); ++i) {
    keys[i] = kind == BF16 ? bf16(kept[2 * i]) : kept[2 * i];
    values[i] = kind == BF16 ? bf16(kept[2 * i + 1]) : kept[2 * i + 1];
  }
  const int32_t slots[] = {1, 0}, positions[] = {before, 0};
  void *key_layers[] = {keys.data()}, *value_layers[] = {values.data()};
  const Cache cache = {key_layers, value_layers, length, kind};
  Model model = {};
  model.n_embd = C, model.n_head = H;
  Step step = {};
  step.slots = slots, step.positions = positions, step.rows = 2;
  step.wide = wide.data(), step.attended = attended.data();
#pragma omp parallel num_threads(2)
  attention<T>(model, step, cache, 0);
  for (int row = 0; row < 2; ++row)
    for (int h = 0; h < H; ++h) {
      const size_t first = ((size_t)slots[row] * H + h) * length * E;
      std::vector<double> out(E);
      double total = 0;
      for (int t = 0; t <= positions[row]; ++t) {
        double score = 0;
        for (int e = 0; e < E; ++e)
          score += (double)wide[row * 3 * C + h * E + e] * number(keys[first + t * E + e]);
        total += std::exp(score);
        for (int e = 0; e < E; ++e) out[e] += std::exp(score) * number(values[first + t * E + e]);
      }
      for (int e = 0; e < E; ++e) {
        CHECK_CLOSE(attended[row * C + h * E + e], out[e] / total, 1e-4);
        const size_t at = first + (size_t)positions[row] * E + e;
        CHECK_CLOSE(number(keys[at]), wide[row * 3 * C + C + h * E + e], off);
        CHECK_CLOSE(number(values[at]), wide[row * 3 * C + 2 * C + h * E + e], off);
      }
    }
}

TEST(a_step_keeps_its_keys_and_values_and_attends_to_all_up_to_its_own) {
  for (const int before : {0, 1, 15, 16, 40})
    for (const int E : {1, 9, 16, 70}) {
      check_a_step<float>(before, E, FP32, 0);
      check_a_step<uint16_t>(before, E, BF16, 0.02);
    }
}
