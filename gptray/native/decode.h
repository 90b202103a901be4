// What the decoder is called with; gptray/native/abi.py mirrors it.
//
// Weights are packed as gemm.h reads them, those of 4 bits as grouped_decode.h does. Everything
// between the products is fp32.
//
// Shapes: N tokens of a step, C = n_embd, H heads of queries, K of keys and values, E = head width,
// R the part of a head that is rotated.

#pragma once

#include "activation.h"

enum Kind : int32_t { FP32, BF16, INT8, INT4, IQ4_NL };

extern "C" {

struct Norm {
  const float *weight, *bias;  // no weight: no norm; no bias: RMSNorm, else layer norm
  float eps;
};

// x (N, inputs) -> x W^T + bias (N, outputs). Of a gated one's outputs each panel has 32 gates,
// then what they let through.
struct Linear {
  const void *weight;
  const float *bias;   // or null
  const float *scale;  // int8: of each output, else null
  int32_t inputs, outputs, kind;
  int32_t number;  // which of an adapter's `LowRank` is added to it; none: -1
};

// x -> x A^T B^T, which an adapter adds to a linear layer.
struct LowRank {
  const void *a;       // A as [rank / RANK_STEP][16 inputs][RANK_STEP][16]
  const void *b;       // B^T as the layer's outputs are packed: [panel][rank][64 outputs]
  int32_t rank, kind;  // a whole number of RANK_STEP, or 0; FP32 or BF16
  int32_t inputs;      // of A, a whole number of 16
};

struct Block {
  Norm before_attn, after_attn, before_mlp, after_mlp, q_norm, k_norm;
  Linear c_attn, attn_proj, c_fc, mlp_proj;
  int32_t window;          // tokens that attention looks back over, its own included
  int32_t rotary;          // R, or 0
  const float *cos, *sin;  // (P, R / 2), or null
};

struct Model {
  const Block *blocks;
  const float *wte, *wpe;  // (V, C), or null for rows of head, fp32 or bf16; (P, C) or null
  Norm ln_f;
  Linear head;
  int32_t n_layer, n_embd, n_head, kv_heads, head_width, activation;
  int32_t residual, parallel;  // as in ModelConfig
  int32_t wide_qk_norm;        // q_norm and k_norm are of all heads at once
  float scale;                 // of embeddings
};

struct Cache {  // keys and values of each layer: (slots, K, length, E), fp32 or bf16
  void *const *keys, *const *values;
  int32_t length, kind;
};

struct Step {
  const int32_t *tokens, *slots, *positions;  // (N)
  const int32_t *asked;                       // the rows whose logits are asked for
  const LowRank *const *adapters;             // (N), each of all layers and an empty one; or null
  int32_t rows, asked_rows;
  int32_t apart;      // no two rows have one slot
  int32_t most_rank;  // of the adapters
  float *x, *made;    // (N, C); made: what a norm takes before it is added to x
  float *attended;    // (N, H E)
  float *narrow;      // (N, most_rank): a layer's input times A^T
  float *wide;        // (N, (H + 2 K) E) or (N, inner)
  int32_t *words;     // N rows as a product reads them, of the most words that one has
  float *logits;      // (asked_rows, logits_stride), -inf beyond the vocabulary
  int32_t logits_stride;
};

}  // extern "C"
