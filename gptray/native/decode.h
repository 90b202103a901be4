// The decoder's structures; gptray/native/abi.py mirrors them.
//
// Weights are packed for gemm.h, 4-bit weights for grouped_decode.h. Everything between the
// products is fp32.
//
// Shapes: N tokens in a step, C = n_embd, H query heads, K key and value heads, E = head width,
// R rotated dimensions of a head.

#pragma once

#include "activation.h"

enum Kind : int32_t { FP32, BF16, INT8, INT4, IQ4_NL };

extern "C" {

struct Norm {
  const float *weight, *bias;  // no weight: no norm; no bias: RMSNorm, else layer norm
  float eps;
};

// x (N, inputs) -> x W^T + bias (N, outputs). For gates, each panel of outputs has 32 gates, then
// the values that they gate.
struct Linear {
  const void *weight;
  const float *bias;   // or null
  const float *scale;  // per output for int8, else null
  int32_t inputs, outputs, kind;
  int32_t number;  // index of its `LowRank` in an adapter; -1 for none
};

// x -> x A^T B^T, which an adapter adds to a linear layer's outputs.
struct LowRank {
  const void *a;       // A as [rank / RANK_STEP][16 inputs][RANK_STEP][16]
  const void *b;       // B^T, packed like the layer's outputs: [panel][rank][64 outputs]
  int32_t rank, kind;  // a multiple of RANK_STEP, or 0; FP32 or BF16
  int32_t inputs;      // A's, a multiple of 16
};

struct Block {
  Norm before_attn, after_attn, before_mlp, after_mlp, q_norm, k_norm;
  Linear c_attn, attn_proj, c_fc, mlp_proj;
  int32_t window;          // tokens that attention looks back over, including the current one
  int32_t rotary;          // R, or 0
  const float *cos, *sin;  // (P, R / 2), or null
};

struct Model {
  const Block *blocks;
  const float *wte, *wpe;  // (V, C), or null to read head's rows (fp32, bf16); (P, C) or null
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
  const int32_t *asked;                       // the rows whose logits are wanted
  const LowRank *const *adapters;             // (N), each of all layers plus an empty one; or null
  int32_t rows, asked_rows;
  int32_t apart;      // no two rows share a slot
  int32_t most_rank;  // the adapters' largest
  float *x, *branch;  // (N, C); branch: a layer's output, before its post-norm and the sum with x
  float *attended;    // (N, H E): the values that each head attends to, times their weights
  float *narrow;      // (N, most_rank): a layer's input times A^T
  float *wide;        // (N, (H + 2 K) E) or (N, inner)
  int32_t *words;     // N rows of packed input, of as many words as the widest layer needs
  float *logits;      // (asked_rows, logits_stride), -inf beyond the vocabulary
  int32_t logits_stride;
};

}  // extern "C"
