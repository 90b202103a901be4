// What the decoder is called with; gptray/native/abi.py mirrors it.
//
// Weights are packed as gemm.h reads them. Everything between the products is fp32.
//
// Shapes: N tokens of a step, C = n_embd, H heads, E = C / H.

#pragma once

#include <cstdint>

enum Kind : int32_t { FP32, BF16, INT8 };

extern "C" {

struct Norm {
  const float *weight, *bias;  // null: no norm
  float eps;
};

struct Linear {  // x (N, inputs) -> x W^T + bias (N, outputs)
  const void *weight;
  const float *bias;    // or null
  const float *scale;   // int8: of each output
  const int32_t *zero;  // int8: 128 x the sum of each output's weights
  int32_t inputs, outputs, kind;
};

struct Block {
  Norm ln_1, ln_2;
  Linear c_attn, attn_proj, c_fc, mlp_proj;
};

struct Model {
  const Block *blocks;
  const float *wte, *wpe;  // (V, C), (P, C)
  Norm ln_f;
  Linear head;
  int32_t n_layer, n_embd, n_head, residual;
};

struct Cache {  // keys and values of each layer: (slots, H, length, E), fp32 or bf16
  void *const *keys, *const *values;
  int32_t length, kind;
};

struct Step {
  const int32_t *tokens, *slots, *positions;  // (N)
  const int32_t *asked;                       // the rows whose logits are asked for
  int32_t rows, asked_rows;
  float *x, *attended, *scales;  // (N, C), (N, C), (N)
  float *wide;                   // (N, max(3 C, n_inner))
  int32_t *words;                // N rows as a product reads them, of the most words that one has
  float *logits;                 // (asked_rows, logits_stride)
  int32_t logits_stride;
};

}  // extern "C"
