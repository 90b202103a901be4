#include "attention_train.h"
#include "check.h"

// Attention of one head in double precision, and its gradients; numbers stand as q, k, v of a
// token.
struct Exact {
  int T, D;
  std::vector<double> out, dq, dk, dv;

  Exact(const std::vector<uint16_t> &qkv, const std::vector<uint16_t> &grad, int T, int D)
      : T(T), D(D), out(T * D), dq(T * D), dk(T * D), dv(T * D) {
    const auto number = [&](int part, int t, int d) {
      return (double)from_bf16(qkv[(t * 3 + part) * D + d]);
    };
    const double scale = 1 / std::sqrt((double)D);
    for (int t = 0; t < T; ++t) {
      std::vector<double> p(t + 1), dp(t + 1);
      double total = 0, delta = 0;
      for (int s = 0; s <= t; ++s) {
        double score = 0;
        for (int d = 0; d < D; ++d) score += number(0, t, d) * number(1, s, d) * scale;
        total += p[s] = std::exp(score);
      }
      for (int s = 0; s <= t; ++s) {
        p[s] /= total;
        for (int d = 0; d < D; ++d) {
          const double of_out = from_bf16(grad[t * D + d]);
          out[t * D + d] += p[s] * number(2, s, d);
          dv[s * D + d] += p[s] * of_out;
          dp[s] += of_out * number(2, s, d);
        }
        delta += p[s] * dp[s];
      }
      for (int s = 0; s <= t; ++s)
        for (int d = 0; d < D; ++d) {
          const double ds = p[s] * (dp[s] - delta) * scale;
          dq[t * D + d] += ds * number(1, s, d);
          dk[s * D + d] += ds * number(0, t, d);
        }
    }
  }
};

TEST(a_head_and_its_gradients_are_loops_over_earlier_tokens) {
  for (const int T : {1, 2, 65, 200})      // beyond 192 queries gradients are summed in parts
    for (const int D : {2, 24, 64, 90}) {  // beyond 64 there are several panels
      const auto qkv = bf16(randoms(3 * T * D, T)), grad = bf16(randoms(T * D, D));
      const size_t stride = 3 * D, width = D;
      const From q = {qkv.data(), stride}, k = {q.first + D, stride}, v = {k.first + D, stride};
      std::vector<uint16_t> out(T * D), d(3 * T * D);
      std::vector<float> log_sums(T);
      const Size size = {T, D};
      attend(q, k, v, size, {out.data(), width}, log_sums.data());
      const BackwardWorkspace backward(k, v, size);
      const Queries of = {q, {out.data(), width}, {grad.data(), width}, log_sums.data()};
      attend_backward(backward, of, {d.data(), stride});
      write_gradients(backward, {d.data() + D, stride}, {d.data() + 2 * D, stride});
      const Exact exact(qkv, grad, T, D);
      for (int t = 0; t < T; ++t)
        for (int i = 0; i < D; ++i) {
          const int at = t * D + i;
          CHECK_CLOSE(from_bf16(out[at]), exact.out[at], 0.03);
          CHECK_CLOSE(from_bf16(d[t * 3 * D + i]), exact.dq[at], 0.06);
          CHECK_CLOSE(from_bf16(d[(t * 3 + 1) * D + i]), exact.dk[at], 0.06);
          CHECK_CLOSE(from_bf16(d[(t * 3 + 2) * D + i]), exact.dv[at], 0.06);
        }
    }
}
