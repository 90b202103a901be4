#include "check.h"
#include "decode.cpp"

namespace {

// A network of two layers in plain loops, whose weights are packed for the decoder too.
constexpr int LAYERS = 2, C = 48, HEADS = 3, E = C / HEADS, INNER = 100, WORDS = 77, LENGTH = 24;

// A layer's weights (outputs, inputs), as numbers and in panels of 64 outputs.
struct Matrix {
  Linear linear = {};
  std::vector<float> weight, bias, scale;
  std::vector<int32_t> words;

  Matrix(int inputs, int outputs, int kind, unsigned seed)
      : weight(randoms(inputs * outputs, seed)), bias(randoms(outputs, seed + 1)) {
    const int per_word = kind == INT8 ? 4 : kind == BF16 ? 2 : 1, bits = 32 / per_word;
    linear = {nullptr, bias.data(), nullptr, inputs, outputs, kind, -1};
    const int count = word_count(linear);
    words.resize((size_t)panel_count(outputs) * count * PANEL, kind == INT8 ? 0x80808080 : 0);
    for (int o = 0; o < outputs; ++o) {
      float most = 0;
      for (int i = 0; i < inputs; ++i) {
        weight[o * inputs + i] /= std::sqrt((float)inputs);
        most = std::max(most, std::fabs(weight[o * inputs + i]));
      }
      scale.push_back(most / 127);
      for (int i = 0; i < inputs; ++i) {
        float &w = weight[o * inputs + i];
        uint32_t code;
        if (kind == INT8) {
          const int whole = std::lrint(w / scale[o]);
          code = whole + 128, w = whole * scale[o];
        } else if (kind == BF16) {
          code = bf16(w), w = from_bf16(code);
        } else {
          std::memcpy(&code, &w, sizeof code);
        }
        int32_t &word = words[((size_t)(o / PANEL) * count + i / per_word) * PANEL + o % PANEL];
        const int shift = i % per_word * bits;
        const uint32_t place = (per_word == 1 ? ~0u : (1u << bits) - 1) << shift;
        word = (word & ~place) | code << shift;
      }
    }
    linear.weight = words.data();
    if (kind == INT8) linear.scale = scale.data();
    pair_weights(&linear);
  }

  std::vector<double> of(const std::vector<double> &x) const {
    std::vector<double> y(bias.begin(), bias.end());
    for (size_t o = 0; o < y.size(); ++o)
      for (size_t i = 0; i < x.size(); ++i) y[o] += x[i] * weight[o * x.size() + i];
    return y;
  }
};

std::vector<double> normed(const std::vector<double> &x) {
  double mean = 0, square = 0;
  for (const double one : x) mean += one / C;
  for (const double one : x) square += (one - mean) * (one - mean) / C;
  std::vector<double> y;
  for (const double one : x) y.push_back((one - mean) / std::sqrt(square + 1e-5));
  return y;
}

struct Network {
  std::vector<Matrix> layers;  // of a block: c_attn, attn_proj, c_fc, mlp_proj; last the head
  std::vector<float> wte = randoms(WORDS * C, 1), wpe = randoms(LENGTH * C, 2);
  std::vector<float> ones = std::vector<float>(C, 1), zeros = std::vector<float>(C);
  std::vector<Block> blocks;
  Model model = {};
  int kind;

  explicit Network(int kind) : kind(kind) {
    const int sizes[4][2] = {{C, 3 * C}, {C, C}, {C, INNER}, {INNER, C}};
    for (int i = 0; i < 4 * LAYERS; ++i)
      layers.emplace_back(sizes[i % 4][0], sizes[i % 4][1], kind, 10 + 2 * i);
    layers.emplace_back(C, WORDS, kind, 9);
    const Norm norm = {ones.data(), zeros.data(), 1e-5f}, none = {};
    for (int i = 0; i < LAYERS; ++i)
      blocks.push_back({norm, none, norm, none, none, none, layers[4 * i].linear,
                        layers[4 * i + 1].linear, layers[4 * i + 2].linear,
                        layers[4 * i + 3].linear, LENGTH, 0, nullptr, nullptr});
    model.blocks = blocks.data(), model.wte = wte.data(), model.wpe = wpe.data();
    model.ln_f = norm, model.head = layers.back().linear;
    model.n_layer = LAYERS, model.n_embd = C, model.n_head = model.kv_heads = HEADS;
    model.head_width = E, model.activation = GELU_TANH, model.residual = 1;
    model.scale = 2.f;
  }

  // Logits of the last of some tokens.
  std::vector<double> logits(const std::vector<int32_t> &tokens) const {
    std::vector<std::vector<double>> x;
    for (size_t t = 0; t < tokens.size(); ++t) {
      x.emplace_back();
      for (int c = 0; c < C; ++c) x[t].push_back(2. * wte[tokens[t] * C + c] + wpe[t * C + c]);
    }
    for (int i = 0; i < LAYERS; ++i) {
      std::vector<std::vector<double>> qkv;
      for (const auto &row : x) qkv.push_back(layers[4 * i].of(normed(row)));
      for (size_t t = 0; t < x.size(); ++t) add(x[t], layers[4 * i + 1].of(attended(qkv, t)));
      for (auto &row : x) {
        std::vector<double> inner = layers[4 * i + 2].of(normed(row));
        for (double &z : inner) z = scalar_gelu(z);
        add(row, layers[4 * i + 3].of(inner));
      }
    }
    return layers.back().of(normed(x.back()));
  }

  static void add(std::vector<double> &x, const std::vector<double> &y) {
    for (size_t i = 0; i < x.size(); ++i) x[i] += y[i];
  }

  static std::vector<double> attended(const std::vector<std::vector<double>> &qkv, size_t t) {
    std::vector<double> out(C);
    for (int h = 0; h < HEADS; ++h) {
      std::vector<double> weights;
      double total = 0;
      for (size_t s = 0; s <= t; ++s) {
        double score = 0;
        for (int e = h * E; e < (h + 1) * E; ++e) score += qkv[t][e] * qkv[s][C + e];
        weights.push_back(std::exp(score)), total += weights.back();
      }
      for (size_t s = 0; s <= t; ++s)
        for (int e = h * E; e < (h + 1) * E; ++e) out[e] += weights[s] / total * qkv[s][2 * C + e];
    }
    return out;
  }
};

// A network's keys and values of some slots, and the memory of its steps.
template <typename T>
struct Decoder {
  const Network &network;
  int slots, threads;
  std::vector<T> kept;
  std::vector<void *> keys, values;

  Decoder(const Network &network, int slots, int threads)
      : network(network), slots(slots), threads(threads) {
    const size_t size = (size_t)slots * LENGTH * C;
    kept.resize(2 * LAYERS * size);
    for (int i = 0; i < LAYERS; ++i) {
      keys.push_back(&kept[2 * i * size]), values.push_back(&kept[(2 * i + 1) * size]);
    }
  }

  // Logits (rows, WORDS) of tokens at positions of slots, of all of them.
  std::vector<float> step(const std::vector<int32_t> &tokens, const std::vector<int32_t> &slots,
                          const std::vector<int32_t> &positions, bool apart) {
    const int rows = tokens.size(), width = std::max(3 * C, INNER);
    std::vector<float> x(rows * C), branch(x), attended(x), wide(rows * width),
        logits(rows * WORDS);
    std::vector<int32_t> asked, words(rows * 1024);
    for (int row = 0; row < rows; ++row) asked.push_back(row);
    const Cache cache = {keys.data(), values.data(), LENGTH, sizeof(T) == 2 ? BF16 : FP32};
    Step step = {};
    step.tokens = tokens.data(), step.slots = slots.data(), step.positions = positions.data();
    step.asked = asked.data(), step.rows = step.asked_rows = rows, step.apart = apart;
    step.x = x.data(), step.branch = branch.data(), step.attended = attended.data();
    step.wide = wide.data(), step.words = words.data();
    step.logits = logits.data(), step.logits_stride = WORDS;
    decode_step(&network.model, &cache, &step, threads);
    return logits;
  }
};

int best(const float *logits) { return std::max_element(logits, logits + WORDS) - logits; }

// Greedy tokens after a prompt that is read at once; all their logits are added to `all`.
template <typename T>
std::vector<int32_t> greedy(const Network &network, int threads, std::vector<float> &all) {
  Decoder<T> decoder(network, 1, threads);
  std::vector<int32_t> text = {5, 70, 33, 8, 41}, positions = {0, 1, 2, 3, 4};
  std::vector<float> logits = decoder.step(text, {0, 0, 0, 0, 0}, positions, false);
  while (text.size() < LENGTH) {
    all.insert(all.end(), logits.end() - WORDS, logits.end());
    text.push_back(best(&all[all.size() - WORDS]));
    logits = decoder.step({text.back()}, {0}, {(int32_t)text.size() - 1}, true);
  }
  return text;
}

template <typename T>
void check_greedy(int kind, double off) {
  const Network network(kind);
  std::vector<float> all;
  const std::vector<int32_t> text = greedy<T>(network, 2, all);
  for (size_t t = 5; t < text.size(); ++t) {
    const auto exact = network.logits({text.begin(), text.begin() + t});
    for (int word = 0; word < WORDS; ++word)
      CHECK_CLOSE(all[(t - 5) * WORDS + word], exact[word], off);
  }
}

}  // namespace

TEST(greedy_decoding_is_that_of_plain_loops) {
  check_greedy<float>(FP32, 1e-4);
  check_greedy<uint16_t>(BF16, 0.1);
  check_greedy<uint16_t>(INT8, 0.2);
}

TEST(a_text_has_the_same_bits_at_any_number_of_threads_and_among_neighbours) {
  for (const int kind : {FP32, BF16, INT8}) {
    const Network network(kind);
    std::vector<float> one, other;
    CHECK(greedy<uint16_t>(network, 1, one) == greedy<uint16_t>(network, 3, other));
    CHECK(!std::memcmp(one.data(), other.data(), one.size() * sizeof(float)));
    const std::vector<int32_t> tokens = {5, 9, 70, 5, 1, 33, 5};
    const std::vector<int32_t> slots = {0, 1, 2, 3, 4, 5, 6}, positions(7);
    const auto all = Decoder<uint16_t>(network, 7, 2).step(tokens, slots, positions, true);
    const auto alone = Decoder<uint16_t>(network, 1, 2).step({5}, {0}, {0}, true);
    for (const int row : {0, 3, 6})
      CHECK(!std::memcmp(&all[row * WORDS], alone.data(), WORDS * sizeof(float)));
  }
}
