// The kernels of a training step in bf16; the same bits at any number of threads. Called by
// gptray/model/kernels.py.
//
// All arrays are contiguous. `work` is aligned to 64 bytes and holds panels of as many columns and
// words as each function says.

#include "abi.h"
#include "frozen_train.h"
#include "head_loss.h"
#include "heads_train.h"
#include "linear_train.h"
#include "norm_train.h"

namespace {

ABI_TYPE(Line, "words")

template <ValueAndSlope of(Floats)>
void linear_with_slope(const uint16_t *x, const float *w, const float *b, uint16_t *y,
                       uint16_t *slope, Line *work, int M, int N, int K, int threads) {
#pragma omp parallel num_threads(threads)
  {
    pack_rows(w, (Words *)work, N, K);
    multiply((const int32_t *)x, (Words *)work, M, K / 2, WithSlope<of>{{{y, N, b}, slope, {}}});
    end_streams();  // after store_stream
  }
}

template <Gated of(Floats, Floats)>
void linear_with_gates(const uint16_t *x, const float *w, const float *b, uint16_t *y,
                       uint16_t *slopes, Line *work, int M, int N, int K, int threads) {
#pragma omp parallel num_threads(threads)
  {
    pack_gated_rows(w, (Words *)work, N, K);
    multiply((const int32_t *)x, (Words *)work, M, K / 2, WithGates<of>{{{y, N, b}, slopes, {}}});
    end_streams();
  }
}

}  // namespace

extern "C" {

// y (M, N) = x (M, K) w (N, K)^T + b (N), or nullptr for no b; K even. work: N columns, K / 2
// words.
void linear(const uint16_t *x, const float *w, const float *b, uint16_t *y, Line *work, int M,
            int N, int K, int threads) {
#pragma omp parallel num_threads(threads)
  {
    pack_rows(w, (Words *)work, N, K);
    multiply_any(x, (Words *)work, M, K / 2, Output{y, N, b});
  }
}

// y = GPT-2's GELU of x w^T + b, and its slope; the rest as `linear`.
void linear_gelu(const uint16_t *x, const float *w, const float *b, uint16_t *y, uint16_t *slope,
                 Line *work, int M, int N, int K, int threads) {
  linear_with_slope<gelu_and_slope>(x, w, b, y, slope, work, M, N, K, threads);
}

// The same with the exact GELU.
void linear_exact_gelu(const uint16_t *x, const float *w, const float *b, uint16_t *y,
                       uint16_t *slope, Line *work, int M, int N, int K, int threads) {
  linear_with_slope<exact_gelu_and_slope>(x, w, b, y, slope, work, M, N, K, threads);
}

// The same with ReLU.
void linear_relu(const uint16_t *x, const float *w, const float *b, uint16_t *y, uint16_t *slope,
                 Line *work, int M, int N, int K, int threads) {
  linear_with_slope<relu_and_slope>(x, w, b, y, slope, work, M, N, K, threads);
}

// y (M, N) = SwiGLU of x (M, K) w (2 N, K)^T + b (2 N), and its slopes (M, 2 N), gates before
// inputs; the rest as `linear`. work: 2 N columns, each half rounded up to 32, K / 2 words.
void linear_swiglu(const uint16_t *x, const float *w, const float *b, uint16_t *y, uint16_t *slopes,
                   Line *work, int M, int N, int K, int threads) {
  linear_with_gates<swiglu>(x, w, b, y, slopes, work, M, N, K, threads);
}

// Like `linear_swiglu`, with GEGLU.
void linear_geglu(const uint16_t *x, const float *w, const float *b, uint16_t *y, uint16_t *slopes,
                  Line *work, int M, int N, int K, int threads) {
  linear_with_gates<geglu>(x, w, b, y, slopes, work, M, N, K, threads);
}

// dx (M, K) = dy (M, N) w (N, K); N even. work: K columns, N / 2 words.
void input_gradient(const uint16_t *dy, const float *w, uint16_t *dx, Line *work, int M, int N,
                    int K, int threads) {
#pragma omp parallel num_threads(threads)
  {
    pack_columns(w, (Words *)work, N, K);
    multiply_any(dy, (Words *)work, M, N / 2, Output{dx, K, nullptr});
  }
}

// dx = dy w times slope (M, K); the rest as `input_gradient`.
void input_gradient_sloped(const uint16_t *dy, const float *w, const uint16_t *slope, uint16_t *dx,
                           Line *work, int M, int N, int K, int threads) {
#pragma omp parallel num_threads(threads)
  {
    pack_columns(w, (Words *)work, N, K);
    multiply((const int32_t *)dy, (Words *)work, M, N / 2, Sloped{{dx, K, nullptr}, slope});
  }
}

// dx (M, 2 K) = dy w times slopes (M, 2 K); the rest as `input_gradient`.
void input_gradient_gates(const uint16_t *dy, const float *w, const uint16_t *slopes, uint16_t *dx,
                          Line *work, int M, int N, int K, int threads) {
#pragma omp parallel num_threads(threads)
  {
    pack_columns(w, (Words *)work, N, K);
    multiply((const int32_t *)dy, (Words *)work, M, N / 2, Gates{{dx, K, nullptr}, slopes});
  }
}

// dw (N, K) = dy (M, N)^T x (M, K), db (N) = sums of dy, or nullptr for no db.
// work: min(N, K) columns, M / 2 words, rounded up to LANES.
void weight_gradients(const uint16_t *dy, const uint16_t *x, float *dw, float *db, Line *work,
                      int M, int N, int K, int threads) {
#pragma omp parallel num_threads(threads)
  weight_gradient(dy, x, dw, db, (Words *)work, M, N, K);
}

// y (M, N) = a(x (M, K) w (N, K)^T + b (N) + u (M, R) up (N, R)^T) for an `Activation` a, and its
// slopes, as in `linear_gelu` and `linear_swiglu`; K and R even. nullptr for no b, no slopes, and
// with R 0 for no u and up. work: columns as there, (K + R) / 2 words.
void frozen_linear(const uint16_t *x, const uint16_t *w, const float *b, const uint16_t *u,
                   const float *up, uint16_t *y, uint16_t *slopes, Line *work, int M, int N, int K,
                   int R, int activation, int threads) {
#pragma omp parallel num_threads(threads)
  frozen_layer(x, w, b, {u, up, R, nullptr}, y, slopes, (Words *)work, M, N, K,
               (Activation)activation);
}

// dx = dy (M, N) w (N, K) + mask (M, K) times du (M, R) down (R, K), all times the slopes of an
// `Activation`, as in `input_gradient_sloped` and `input_gradient_gates`; N and R even. nullptr for
// no mask, no slopes, and with R 0 for no du and down. work: K columns, (N + R) / 2 words.
void frozen_input_gradient(const uint16_t *dy, const uint16_t *w, const uint16_t *du,
                           const float *down, const uint16_t *mask, const uint16_t *slopes,
                           uint16_t *dx, Line *work, int M, int N, int K, int R, int activation,
                           int threads) {
#pragma omp parallel num_threads(threads)
  frozen_gradient(dy, w, {du, down, R, mask}, slopes, dx, (Words *)work, M, N, K,
                  (Activation)activation);
}

// y (M, C) = layer norm of x (M, C), or RMSNorm if bias is nullptr.
void layer_norm(const uint16_t *x, const float *weight, const float *bias, uint16_t *y, float eps,
                int M, int C, int threads) {
#pragma omp parallel num_threads(threads)
  normalise_rows(x, weight, bias, y, eps, M, C);
}

// dbias is nullptr for RMSNorm. sums: scratch memory for NORM_PARTS * 2 C numbers.
void layer_norm_gradients(const uint16_t *dy, const uint16_t *x, const float *weight, uint16_t *dx,
                          float *dweight, float *dbias, float *sums, float eps, int M, int C,
                          int threads) {
#pragma omp parallel num_threads(threads)
  norm_gradients(dy, x, weight, dx, dweight, dbias, sums, eps, M, C);
}

// qkv (B, T, (H + 2 K) D) -> out (B, T, H D) and, for the backward pass, log_sums (B, H, T); D
// even, K divides H. Queries and keys are first normalised with weights (D) and eps, and rotated by
// angles, (T, half) each; nullptr or half 0 for neither.
void attention(const uint16_t *qkv, const float *q_weight, const float *k_weight,
               const uint16_t *cosines, const uint16_t *sines, uint16_t *out, float *log_sums,
               float eps, int B, int T, int H, int K, int D, int half, int threads) {
  const Heads heads = {T, H, K, D};
  const Preparation queries = {q_weight, eps, cosines, sines, half};
  const Preparation keys = {k_weight, eps, cosines, sines, half};
#pragma omp parallel for collapse(2) num_threads(threads) schedule(static)
  for (int b = 0; b < B; ++b)
    for (int h = 0; h < H; ++h) attend_head(heads, queries, keys, qkv, out, log_sums, b, h);
}

// grad (B, T, H D) -> dqkv (B, T, (H + 2 K) D), and the gradients of the norms' weights, dweights
// (2, D). sums: B K partial sums of 2 D numbers, added in one fixed order. The rest as `attention`.
void attention_gradient(const uint16_t *grad, const uint16_t *qkv, const float *q_weight,
                        const float *k_weight, const uint16_t *cosines, const uint16_t *sines,
                        const uint16_t *out, const float *log_sums, uint16_t *dqkv, float *dweights,
                        float *sums, float eps, int B, int T, int H, int K, int D, int half,
                        int threads) {
  const Heads heads = {T, H, K, D};
  const Preparation queries = {q_weight, eps, cosines, sines, half};
  const Preparation keys = {k_weight, eps, cosines, sines, half};
  const Pass pass = {grad, qkv, out, log_sums, dqkv};
  std::fill(sums, sums + (size_t)B * K * 2 * D, 0.f);
#pragma omp parallel for collapse(2) num_threads(threads) schedule(static)
  for (int b = 0; b < B; ++b)
    for (int g = 0; g < K; ++g)
      group_gradient(heads, queries, keys, pass, sums + ((size_t)b * K + g) * 2 * D, b, g);
  for (int i = 0; i < 2 * D; ++i) {
    dweights[i] = 0.f;
    for (int part = 0; part < B * K; ++part) dweights[i] += sums[(size_t)part * 2 * D + i];
  }
}

// The losses (M) of x (M, C) w (V, C)^T, -log softmax at the targets (M), and the gradients of
// their sum: dx (M, C) and dw (V, C), or nullptr for no dw. If w is nullptr, `frozen` replaces it.
// Only the first `valid` of V are tokens; C even.
void head_loss(const uint16_t *x, const float *w, const uint16_t *frozen, const int64_t *targets,
               float *losses, uint16_t *dx, float *dw, int M, int V, int C, int valid,
               int threads) {
  const Head head = {w, V, C, valid, frozen};
  const HeadRows rows = {x, targets, losses, dx};
  thread_local Piece kept;
  Piece &piece = kept;  // the calling thread's, for all threads of the region
  piece.fit(head, piece_rows(M, V));
#pragma omp parallel num_threads(threads)
  head_pass(head, rows, dw, piece, M);
}

const char *train_abi() {
  static const std::string text =
      ABI_CONSTANT(NORM_PARTS) + ABI_FUNCTION(linear) + ABI_FUNCTION(linear_gelu) +
      ABI_FUNCTION(linear_exact_gelu) + ABI_FUNCTION(linear_relu) + ABI_FUNCTION(linear_swiglu) +
      ABI_FUNCTION(linear_geglu) + ABI_FUNCTION(input_gradient) +
      ABI_FUNCTION(input_gradient_sloped) + ABI_FUNCTION(input_gradient_gates) +
      ABI_FUNCTION(weight_gradients) + ABI_FUNCTION(layer_norm) +
      ABI_FUNCTION(layer_norm_gradients) + ABI_FUNCTION(frozen_linear) +
      ABI_FUNCTION(frozen_input_gradient) + ABI_FUNCTION(attention) +
      ABI_FUNCTION(attention_gradient) + ABI_FUNCTION(head_loss);
  return text.c_str();
}

}  // extern "C"
