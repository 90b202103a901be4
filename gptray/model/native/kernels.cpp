// A training step's kernels in bf16, the same bits at any number of threads; called by kernels.py.
//
// Rows stand one after the other, without gaps. `work` is aligned to 64 bytes and takes panels of
// as many columns and words as each function says.

#include "attention.h"
#include "gelu.h"
#include "linear.h"
#include "norm.h"

extern "C" {

// y (M, N) = x (M, K) w (N, K)^T + b (N); K even. work: N columns, K / 2 words.
void linear(const uint16_t *x, const float *w, const float *b, uint16_t *y, Words *work, int M,
            int N, int K, int threads) {
#pragma omp parallel num_threads(threads)
  {
    pack_rows(w, work, N, K);
    multiply((const int32_t *)x, work, b, y, M, N, K / 2);
  }
}

// dx (M, K) = dy (M, N) w (N, K); N even. work: K columns, N / 2 words.
void input_gradient(const uint16_t *dy, const float *w, uint16_t *dx, Words *work, int M, int N,
                    int K, int threads) {
#pragma omp parallel num_threads(threads)
  {
    pack_columns(w, work, N, K);
    multiply((const int32_t *)dy, work, nullptr, dx, M, K, N / 2);
  }
}

// dw (N, K) = dy (M, N)^T x (M, K), db (N) = sums of dy.
// work: min(N, K) columns, M / 2 words, rounded up.
void weight_gradients(const uint16_t *dy, const uint16_t *x, float *dw, float *db, Words *work,
                      int M, int N, int K, int threads) {
#pragma omp parallel num_threads(threads)
  weight_gradient(dy, x, dw, db, work, M, N, K);
}

// y = GELU of x, `size` numbers of each.
void gelu(const uint16_t *x, uint16_t *y, int size, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int i = 0; i < size; i += LANES)
    store(y + i, gelu(load(x + i, lanes(size - i))), lanes(size - i));
}

// dx = dy times GELU's slope at x.
void gelu_gradient(const uint16_t *dy, const uint16_t *x, uint16_t *dx, int size, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int i = 0; i < size; i += LANES) {
    const __mmask16 mask = lanes(size - i);
    store(dx + i, _mm512_mul_ps(load(dy + i, mask), gelu_slope(load(x + i, mask))), mask);
  }
}

// y (M, C) = layer norm of x (M, C).
void layer_norm(const uint16_t *x, const float *weight, const float *bias, uint16_t *y, float eps,
                int M, int C, int threads) {
#pragma omp parallel num_threads(threads)
  normalise(x, weight, bias, y, eps, M, C);
}

// sums: NORM_PARTS * 2 C numbers of room.
void layer_norm_gradients(const uint16_t *dy, const uint16_t *x, const float *weight, uint16_t *dx,
                          float *dweight, float *dbias, float *sums, float eps, int M, int C,
                          int threads) {
#pragma omp parallel num_threads(threads)
  norm_gradients(dy, x, weight, dx, dweight, dbias, sums, eps, M, C);
}

// qkv (B, T, 3 H D) -> out (B, T, H D) and, for the way back, log_sums (B, H, T); D even, <= 64.
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

}  // extern "C"
