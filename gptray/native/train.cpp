// A training step's kernels in bf16, the same bits at any number of threads; called by
// gptray/model/kernels.py.
//
// Rows stand one after the other, without gaps. `work` is aligned to 64 bytes and takes panels of
// as many columns and words as each function says.

#include "abi.h"
#include "attention_train.h"
#include "linear_train.h"
#include "norm_train.h"

namespace {

ABI_TYPE(Line, "words")

}  // namespace

extern "C" {

// y (M, N) = x (M, K) w (N, K)^T + b (N); K even. work: N columns, K / 2 words.
void linear(const uint16_t *x, const float *w, const float *b, uint16_t *y, Line *work, int M,
            int N, int K, int threads) {
#pragma omp parallel num_threads(threads)
  {
    pack_rows(w, (Words *)work, N, K);
    multiply((const int32_t *)x, (Words *)work, b, M, N, K / 2, Output{y, N});
  }
}

// y = GELU of x w^T + b, and the slope there; the rest as `linear`.
void linear_gelu(const uint16_t *x, const float *w, const float *b, uint16_t *y, uint16_t *slope,
                 Line *work, int M, int N, int K, int threads) {
#pragma omp parallel num_threads(threads)
  {
    pack_rows(w, (Words *)work, N, K);
    multiply((const int32_t *)x, (Words *)work, b, M, N, K / 2, WithGelu{{y, N}, slope, {}});
    _mm_sfence();  // after store_far
  }
}

// dx (M, K) = dy (M, N) w (N, K); N even. work: K columns, N / 2 words.
void input_gradient(const uint16_t *dy, const float *w, uint16_t *dx, Line *work, int M, int N,
                    int K, int threads) {
#pragma omp parallel num_threads(threads)
  {
    pack_columns(w, (Words *)work, N, K);
    multiply((const int32_t *)dy, (Words *)work, nullptr, M, K, N / 2, Output{dx, K});
  }
}

// dx = dy w times slope (M, K); the rest as `input_gradient`.
void input_gradient_gelu(const uint16_t *dy, const float *w, const uint16_t *slope, uint16_t *dx,
                         Line *work, int M, int N, int K, int threads) {
#pragma omp parallel num_threads(threads)
  {
    pack_columns(w, (Words *)work, N, K);
    multiply((const int32_t *)dy, (Words *)work, nullptr, M, K, N / 2, Sloped{{dx, K}, slope});
  }
}

// dw (N, K) = dy (M, N)^T x (M, K), db (N) = sums of dy.
// work: min(N, K) columns, M / 2 words, rounded up.
void weight_gradients(const uint16_t *dy, const uint16_t *x, float *dw, float *db, Line *work,
                      int M, int N, int K, int threads) {
#pragma omp parallel num_threads(threads)
  weight_gradient(dy, x, dw, db, (Words *)work, M, N, K);
}

// y (M, C) = layer norm of x (M, C).
void layer_norm(const uint16_t *x, const float *weight, const float *bias, uint16_t *y, float eps,
                int M, int C, int threads) {
#pragma omp parallel num_threads(threads)
  normalise_rows(x, weight, bias, y, eps, M, C);
}

// sums: NORM_PARTS * 2 C numbers of room.
void layer_norm_gradients(const uint16_t *dy, const uint16_t *x, const float *weight, uint16_t *dx,
                          float *dweight, float *dbias, float *sums, float eps, int M, int C,
                          int threads) {
#pragma omp parallel num_threads(threads)
  norm_gradients(dy, x, weight, dx, dweight, dbias, sums, eps, M, C);
}

// qkv (B, T, 3 H D) -> out (B, T, H D) and, for the backward pass, log_sums (B, H, T); D even,
// <= 64.
void attention(const uint16_t *qkv, uint16_t *out, float *log_sums, int B, int T, int H, int D,
               int threads) {
  const size_t C = H * D;
#pragma omp parallel for collapse(2) num_threads(threads) schedule(static)
  for (int b = 0; b < B; ++b)
    for (int h = 0; h < H; ++h) {
      const uint16_t *q = qkv + b * T * 3 * C + h * D;
      attend({q, q + C, q + 2 * C, 3 * C, T, D}, out + b * T * C + h * D, C,
             log_sums + ((size_t)b * H + h) * T);
    }
}

// grad (B, T, H D) -> dqkv (B, T, 3 H D)
void attention_gradient(const uint16_t *grad, const uint16_t *qkv, const uint16_t *out,
                        const float *log_sums, uint16_t *dqkv, int B, int T, int H, int D,
                        int threads) {
  const size_t C = H * D;
#pragma omp parallel for collapse(2) num_threads(threads) schedule(static)
  for (int b = 0; b < B; ++b)
    for (int h = 0; h < H; ++h) {
      const size_t in = b * T * 3 * C + h * D, at = b * T * C + h * D;
      Backward w = {};
      w.head = {qkv + in, qkv + in + C, qkv + in + 2 * C, 3 * C, T, D};
      w.out = out + at, w.grad = grad + at, w.stride = C;
      w.log_sums = log_sums + ((size_t)b * H + h) * T;
      attend_backward(w, dqkv + in, dqkv + in + C, dqkv + in + 2 * C);
    }
}

const char *train_abi() {
  static const std::string text = ABI_CONSTANT(NORM_PARTS) + ABI_FUNCTION(linear) +
                                  ABI_FUNCTION(linear_gelu) + ABI_FUNCTION(input_gradient) +
                                  ABI_FUNCTION(input_gradient_gelu) +
                                  ABI_FUNCTION(weight_gradients) + ABI_FUNCTION(layer_norm) +
                                  ABI_FUNCTION(layer_norm_gradients) + ABI_FUNCTION(attention) +
                                  ABI_FUNCTION(attention_gradient);
  return text.c_str();
}

}  // extern "C"
