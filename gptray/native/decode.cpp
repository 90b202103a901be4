// A decoding step in one call, a row's top-k tokens, and drawing from them.
//
// Every sum runs over a row's own numbers in one fixed order. So a token's logits have the same
// bits alone or in any batch, whether its prompt was read at once or token by token.

#include "decode.h"

#include "abi.h"
#include "attention_decode.h"
#include "candidates.h"
#include "draw.h"
#include "linear_decode.h"
#include "tile_check.h"

namespace {

// All threads of a step call these functions and share their loops.

void embed(const Model &model, const Step &step) {
  const int C = model.n_embd;
#pragma omp for schedule(static)
  for (int row = 0; row < step.rows; ++row) {
    const size_t token = step.tokens[row];
    float *x = step.x + (size_t)row * C;
    if (model.wte)
      std::copy_n(model.wte + token * C, C, x);
    else
      read_row(model.head, token, x);
    if (model.scale != 1.f)
      for (int i = 0; i < C; ++i) x[i] *= model.scale;
    if (!model.wpe) continue;
    const float *position = model.wpe + (size_t)step.positions[row] * C;
    for (int i = 0; i < C; ++i) x[i] += position[i];
  }
}

// x += a layer's outputs for rows, through its post-norm if it has one; x = them unless `adds`.
void update_residual(Team &team, const Model &model, const Step &step, const Linear &layer,
                     const float *rows, const Norm &norm, bool adds) {
  const int C = model.n_embd;
  const float *add = adds ? step.x : nullptr;
  if (!norm.weight)
    return linear(team, layer, step, rows, nullptr, nullptr, step.rows, {step.x, add, C});
  linear(team, layer, step, rows, nullptr, nullptr, step.rows, {step.branch, nullptr, C});
#pragma omp for schedule(static)
  for (int row = 0; row < step.rows; ++row) {
    float *x = step.x + (size_t)row * C, *branch = step.branch + (size_t)row * C;
    normalise(branch, norm.weight, norm.bias, branch, norm.eps, C);
    for (int i = 0; i < C; ++i) x[i] = adds ? x[i] + branch[i] : branch[i];
  }
}

void block(Team &team, const Model &model, const Step &step, const Cache &cache, int number) {
  const Block &b = model.blocks[number];
  const auto add_attended = [&] {
    update_residual(team, model, step, b.attn_proj, step.attended, b.after_attn, model.residual);
  };
  linear(team, b.c_attn, step, step.x, &b.before_attn, nullptr, step.rows,
         {step.wide, nullptr, b.c_attn.outputs});
  (cache.kind == BF16 ? attention<uint16_t> : attention<float>)(team, model, step, cache, number);
  if (!model.parallel) add_attended();
  linear(team, b.c_fc, step, step.x, &b.before_mlp, nullptr, step.rows,
         {step.wide, nullptr, b.mlp_proj.inputs, model.activation});
  if (model.parallel) add_attended();
  update_residual(team, model, step, b.mlp_proj, step.wide, b.after_mlp,
                  model.residual || model.parallel);
}

ABI_TYPE(Norm, "Norm")
ABI_TYPE(Linear, "Linear")
ABI_TYPE(LowRank, "LowRank")
ABI_TYPE(Block, "Block")
ABI_TYPE(Model, "Model")
ABI_TYPE(Cache, "Cache")
ABI_TYPE(Step, "Step")
ABI_TYPE(Draw, "Draw")

}  // namespace

// The top k of each row of logits (rows, width) and their ids, (rows, k) each.
extern "C" void top_candidates(const float *logits, int32_t rows, int32_t width, int32_t k,
                               float *values, int64_t *ids, int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int row = 0; row < rows; ++row) {
    const size_t at = (size_t)row * k;
    top_of_row(logits + (size_t)row * width, width, k, values + at, ids + at);
  }
}

// The top k of each row of logits (rows, width) to draw from: the largest logit, (rows), and the
// ids and the logarithms of their weights, (rows, k) each.
extern "C" void rank_rows(const float *logits, int32_t rows, int32_t width, int32_t k,
                          const Draw *draws, float *best, int64_t *ids, double *logs,
                          int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int row = 0; row < rows; ++row) {
    const size_t at = (size_t)row * k;
    std::vector<float> values(k);
    top_of_row(logits + (size_t)row * width, width, k, values.data(), ids + at);
    best[row] = values[0];
    log_weights(values.data(), k, draws[row].temperature, logs + at);
  }
}

// The token that each row draws from its k candidates, by their weights (rows, k).
extern "C" void draw_rows(const double *weights, const int64_t *ids, int32_t rows, int32_t k,
                          const Draw *draws, int64_t *tokens) {
  for (int row = 0; row < rows; ++row) {
    const size_t at = (size_t)row * k;
    tokens[row] = ids[at + draw_candidate(weights + at, k, draws[row])];
  }
}

extern "C" void decode_step(const Model *model, const Cache *cache, const Step *step,
                            int32_t threads) {
  Team team(threads);
#pragma omp parallel num_threads(threads)
  {
    embed(*model, *step);
    for (int layer = 0; layer < model->n_layer; ++layer) block(team, *model, *step, *cache, layer);
    linear(team, model->head, *step, step->x, &model->ln_f, step->asked, step->asked_rows,
           {step->logits, nullptr, step->logits_stride});
  }
  for (int row = 0; row < step->asked_rows; ++row) {
    float *logits = step->logits + (size_t)row * step->logits_stride;
    std::fill(logits + model->head.outputs, logits + step->logits_stride, -INFINITY);
  }
}

// Put a packed layer's weights into pairs of words, if this library multiplies them so.
extern "C" void pair_weights(const Linear *linear) { pair_words(*linear); }

// For `gptray.native.build`: whether this library works here.
extern "C" int32_t works_here() {
  if constexpr (HAS_TILES) return tiles_are_right();
  return true;
}

extern "C" const char *decode_abi() {
  static const std::string text =
      ABI_CONSTANT(LANES) + ABI_CONSTANT(PANEL) + ABI_CONSTANT(RANK_STEP) + ABI_CONSTANT(FP32) +
      ABI_CONSTANT(BF16) + ABI_CONSTANT(INT8) + ABI_CONSTANT(INT4) + ABI_CONSTANT(IQ4_NL) +
      ABI_CONSTANT(GROUP) + ABI_CONSTANT(INT8_GROUP) + ABI_CONSTANT(NONE) +
      ABI_CONSTANT(GELU_TANH) + ABI_CONSTANT(GELU) + ABI_CONSTANT(RELU) + ABI_CONSTANT(SWIGLU) +
      ABI_CONSTANT(GEGLU) +
      ABI_STRUCT(Norm, ABI_FIELD(Norm, weight), ABI_FIELD(Norm, bias), ABI_FIELD(Norm, eps)) +
      ABI_STRUCT(Linear, ABI_FIELD(Linear, weight), ABI_FIELD(Linear, bias),
                 ABI_FIELD(Linear, scale), ABI_FIELD(Linear, inputs), ABI_FIELD(Linear, outputs),
                 ABI_FIELD(Linear, kind), ABI_FIELD(Linear, number)) +
      ABI_STRUCT(LowRank, ABI_FIELD(LowRank, a), ABI_FIELD(LowRank, b), ABI_FIELD(LowRank, rank),
                 ABI_FIELD(LowRank, kind), ABI_FIELD(LowRank, inputs)) +
      ABI_STRUCT(Block, ABI_FIELD(Block, before_attn), ABI_FIELD(Block, after_attn),
                 ABI_FIELD(Block, before_mlp), ABI_FIELD(Block, after_mlp),
                 ABI_FIELD(Block, q_norm), ABI_FIELD(Block, k_norm), ABI_FIELD(Block, c_attn),
                 ABI_FIELD(Block, attn_proj), ABI_FIELD(Block, c_fc), ABI_FIELD(Block, mlp_proj),
                 ABI_FIELD(Block, window), ABI_FIELD(Block, rotary), ABI_FIELD(Block, cos),
                 ABI_FIELD(Block, sin)) +
      ABI_STRUCT(Model, ABI_FIELD(Model, blocks), ABI_FIELD(Model, wte), ABI_FIELD(Model, wpe),
                 ABI_FIELD(Model, ln_f), ABI_FIELD(Model, head), ABI_FIELD(Model, n_layer),
                 ABI_FIELD(Model, n_embd), ABI_FIELD(Model, n_head), ABI_FIELD(Model, kv_heads),
                 ABI_FIELD(Model, head_width), ABI_FIELD(Model, activation),
                 ABI_FIELD(Model, residual), ABI_FIELD(Model, parallel),
                 ABI_FIELD(Model, wide_qk_norm), ABI_FIELD(Model, scale)) +
      ABI_STRUCT(Cache, ABI_FIELD(Cache, keys), ABI_FIELD(Cache, values), ABI_FIELD(Cache, length),
                 ABI_FIELD(Cache, kind)) +
      ABI_STRUCT(Step, ABI_FIELD(Step, tokens), ABI_FIELD(Step, slots), ABI_FIELD(Step, positions),
                 ABI_FIELD(Step, asked), ABI_FIELD(Step, adapters), ABI_FIELD(Step, rows),
                 ABI_FIELD(Step, asked_rows), ABI_FIELD(Step, apart), ABI_FIELD(Step, most_rank),
                 ABI_FIELD(Step, x), ABI_FIELD(Step, branch), ABI_FIELD(Step, attended),
                 ABI_FIELD(Step, narrow), ABI_FIELD(Step, wide), ABI_FIELD(Step, words),
                 ABI_FIELD(Step, logits), ABI_FIELD(Step, logits_stride)) +
      ABI_STRUCT(Draw, ABI_FIELD(Draw, temperature), ABI_FIELD(Draw, top_p), ABI_FIELD(Draw, min_p),
                 ABI_FIELD(Draw, seed), ABI_FIELD(Draw, row), ABI_FIELD(Draw, position),
                 ABI_FIELD(Draw, top_k)) +
      ABI_FUNCTION(pair_weights) + ABI_FUNCTION(decode_step) + ABI_FUNCTION(top_candidates) +
      ABI_FUNCTION(rank_rows) + ABI_FUNCTION(draw_rows);
  return text.c_str();
}
