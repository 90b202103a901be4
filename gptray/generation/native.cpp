// A step of a GPT-2 decoder in one call, for x86 processors with AVX-512 and its dot products.
//
// Every sum runs over a row's own numbers in one fixed order. So what a token gets has the same
// bits alone or among any neighbours, whether its prompt was read at once or token by token.
// Weights are packed as the inner loop reads them: [panel of 64 outputs][word][64 outputs], a word
// being the 4 bytes that a lane multiplies at once: 4 int8, 2 bf16 or 1 fp32. Everything between
// the products is fp32.
//
// Shapes: N tokens of a step, C = n_embd, H heads, E = C / H.

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

enum Kind : int32_t { FP32, BF16, INT8 };

// Mirrored in native.py.
extern "C" {

struct Norm {
  const float *weight, *bias;  // null: no norm
  float eps;
};

struct Linear {  // x (N, in) -> x W^T + bias (N, out)
  const void *weight;
  const float *bias;    // or null
  const float *scale;   // int8: of each output
  const int32_t *zero;  // int8: 128 x the sum of each output's weights
  int32_t in, out, kind;
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

namespace {

constexpr int LANES = 16, BLOCKS = 4, PANEL = LANES * BLOCKS;
constexpr int TILE = 6;        // rows at once: 24 sums, 4 weights and a number of x in 32 registers
constexpr int ROW_BLOCK = 96;  // rows that use a panel while it is near

using Floats = __m512;

inline __mmask16 lanes(int count) { return count >= LANES ? 0xFFFF : (1u << count) - 1; }

inline Floats load(const float *from, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, from); }

inline Floats load(const uint16_t *from, __mmask16 mask) {  // bf16
  const __m256i halves = _mm256_maskz_loadu_epi16(mask, from);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

inline void store(float *to, Floats value, __mmask16 mask) {
  _mm512_mask_storeu_ps(to, mask, value);
}

inline void store(uint16_t *to, Floats value, __mmask16 mask) {
  _mm256_mask_storeu_epi16(to, mask, (__m256i)_mm512_cvtneps_pbh(value));
}

// Ask for memory that is read soon.
template <typename T>
inline void fetch(const T *from, int count) {
  for (int byte = 0; byte < count * (int)sizeof(T); byte += 64)
    _mm_prefetch((const char *)from + byte, _MM_HINT_T0);
}

// 2^n e^r with |r| <= ln 2 / 2; off by 1e-7 of the value.
inline Floats exp(Floats x) {
  x = _mm512_max_ps(x, _mm512_set1_ps(-104.f));
  const Floats n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
  Floats r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  Floats p = _mm512_set1_ps(1.f / 5040);
  for (const float c : {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 0.5f, 1.f, 1.f})
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
  return _mm512_scalef_ps(p, n);
}

// GPT-2's: x / (1 + e^(-2u)), u = sqrt(2 / pi) (x + 0.044715 x^3)
inline Floats gelu(Floats x) {
  const Floats square = _mm512_mul_ps(x, x), one = _mm512_set1_ps(1.f);
  const Floats u = _mm512_mul_ps(x, _mm512_fmadd_ps(_mm512_set1_ps(0.044715f), square, one));
  const Floats e = exp(_mm512_mul_ps(u, _mm512_set1_ps(-1.5957691216f)));
  return _mm512_div_ps(x, _mm512_add_ps(one, e));
}

// --- rows as a product reads them

inline int word_count(const Linear &linear) {
  const int per_word = linear.kind == INT8 ? 4 : linear.kind == BF16 ? 2 : 1;
  return (linear.in + per_word - 1) / per_word;
}

// Words from one row to the next: a row is written 16 words at a time.
inline size_t row_words(const Linear &linear) {
  return (word_count(linear) + LANES - 1) / LANES * LANES;
}

// A row of numbers as words; those beyond it meet weights of 0. Returns the row's scale.
float to_words(const float *row, int size, int kind, int32_t *words) {
  if (kind == FP32) {
    std::memcpy(words, row, size * sizeof(float));
    return 1.f;
  }
  if (kind == BF16) {
    for (int i = 0; i < size; i += LANES)
      store((uint16_t *)words + i, load(row + i, lanes(size - i)), 0xFFFF);
    return 1.f;
  }
  Floats most = _mm512_set1_ps(1e-12f);
  for (int i = 0; i < size; i += LANES)
    most = _mm512_max_ps(most, _mm512_abs_ps(load(row + i, lanes(size - i))));
  const float scale = _mm512_reduce_max_ps(most) / 127.f;
  for (int i = 0; i < size; i += LANES) {
    const Floats scaled = _mm512_div_ps(load(row + i, lanes(size - i)), _mm512_set1_ps(scale));
    // Unsigned, with 128 for zero: the dot product takes unsigned by signed.
    const __m512i whole = _mm512_add_epi32(_mm512_cvtps_epi32(scaled), _mm512_set1_epi32(128));
    _mm_storeu_si128((__m128i *)((uint8_t *)words + i), _mm512_cvtepi32_epi8(whole));
  }
  return scale;
}

void normalise(const float *x, const Norm &norm, int C, float *out) {
  Floats sum = _mm512_setzero_ps(), square = _mm512_setzero_ps();
  for (int i = 0; i < C; i += LANES) sum = _mm512_add_ps(sum, load(x + i, lanes(C - i)));
  const Floats mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / C);
  for (int i = 0; i < C; i += LANES) {
    const Floats d = _mm512_maskz_sub_ps(lanes(C - i), load(x + i, lanes(C - i)), mean);
    square = _mm512_fmadd_ps(d, d, square);
  }
  const float variance = _mm512_reduce_add_ps(square) / C;
  const Floats scale = _mm512_set1_ps(1.f / std::sqrt(variance + norm.eps));
  for (int i = 0; i < C; i += LANES) {
    const __mmask16 mask = lanes(C - i);
    const Floats y = _mm512_mul_ps(_mm512_sub_ps(load(x + i, mask), mean), scale);
    const Floats weight = load(norm.weight + i, mask), bias = load(norm.bias + i, mask);
    store(out + i, _mm512_fmadd_ps(y, weight, bias), mask);
  }
}

// --- products

template <int KIND>
struct Sum {  // fp32 or bf16
  using Type = Floats;
  static Type zero() { return _mm512_setzero_ps(); }
  static Type add(Type sum, __m512i x, __m512i w) {
    if (KIND == BF16) return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)w);
    return _mm512_fmadd_ps(_mm512_castsi512_ps(x), _mm512_castsi512_ps(w), sum);
  }
  static Floats value(Type sum, const Linear &, int, __mmask16, float) { return sum; }
};

template <>
struct Sum<INT8> {
  using Type = __m512i;
  static Type zero() { return _mm512_setzero_si512(); }
  static Type add(Type sum, __m512i x, __m512i w) {
    // Around the intrinsic GCC 12 moves every sum to memory and back, at half the speed.
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(w));
    return sum;
  }
  static Floats value(Type sum, const Linear &linear, int column, __mmask16 mask, float scale) {
    const __m512i zero = _mm512_maskz_loadu_epi32(mask, linear.zero + column);
    const Floats both = _mm512_mul_ps(load(linear.scale + column, mask), _mm512_set1_ps(scale));
    return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(sum, zero)), both);
  }
};

struct Output {
  float *rows;       // (N, stride)
  const float *add;  // (N, stride), or null
  int stride;
  bool gelu;
};

// ROWS rows by one panel.
template <int KIND, int ROWS>
void tile(const Linear &linear, int panel, const int32_t *words, const float *scales,
          const Output &out, int row) {
  const int count = word_count(linear);
  const int32_t *x[ROWS];
  for (int r = 0; r < ROWS; ++r) x[r] = words + (row + r) * row_words(linear);
  const __m512i *w = (const __m512i *)linear.weight + (size_t)panel * count * BLOCKS;
  typename Sum<KIND>::Type sums[ROWS][BLOCKS];
  for (auto &of_row : sums)
    for (auto &sum : of_row) sum = Sum<KIND>::zero();
  for (int k = 0; k < count; ++k, w += BLOCKS) {
    __m512i weights[BLOCKS];
    for (int b = 0; b < BLOCKS; ++b) {
      weights[b] = _mm512_loadu_si512(w + b);
      if (ROWS > 1) asm("" : "+v"(weights[b]));  // or GCC loads them again for each row
    }
    for (int r = 0; r < ROWS; ++r) {
      const __m512i number = _mm512_set1_epi32(x[r][k]);
      for (int b = 0; b < BLOCKS; ++b)
        sums[r][b] = Sum<KIND>::add(sums[r][b], number, weights[b]);
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int b = 0; b < BLOCKS; ++b) {
      const int column = panel * PANEL + b * LANES;
      if (column >= linear.out) continue;
      const __mmask16 mask = lanes(linear.out - column);
      const size_t at = (size_t)(row + r) * out.stride + column;
      Floats y = Sum<KIND>::value(sums[r][b], linear, column, mask, scales[row + r]);
      if (linear.bias) y = _mm512_add_ps(y, load(linear.bias + column, mask));
      if (out.gelu) y = gelu(y);
      if (out.add) y = _mm512_add_ps(y, load(out.add + at, mask));
      store(out.rows + at, y, mask);
    }
}

// Rows first .. stop - 1 by one panel, in tiles of about the same height.
template <int KIND>
void tiles(const Linear &linear, int panel, const int32_t *words, const float *scales,
           const Output &out, int first, int stop) {
  for (int row = first, rows; row < stop; row += rows) {
    const int left = (stop - row + TILE - 1) / TILE;
    rows = (stop - row + left - 1) / left;
    switch (rows) {
      case 1: tile<KIND, 1>(linear, panel, words, scales, out, row); break;
      case 2: tile<KIND, 2>(linear, panel, words, scales, out, row); break;
      case 3: tile<KIND, 3>(linear, panel, words, scales, out, row); break;
      case 4: tile<KIND, 4>(linear, panel, words, scales, out, row); break;
      case 5: tile<KIND, 5>(linear, panel, words, scales, out, row); break;
      default: tile<KIND, TILE>(linear, panel, words, scales, out, row);
    }
  }
}

// All threads of a step run what follows, and share its loops.

void multiply(const Linear &linear, const Step &step, int rows, const Output &out) {
  const int panels = (linear.out + PANEL - 1) / PANEL;
  // Cores are seldom equally fast: others' work and other machines' take from each in turn.
#pragma omp for collapse(2) schedule(dynamic)
  for (int first = 0; first < rows; first += ROW_BLOCK)
    for (int panel = 0; panel < panels; ++panel) {
      const int stop = first + ROW_BLOCK < rows ? first + ROW_BLOCK : rows;
      const auto run = linear.kind == INT8   ? tiles<INT8>
                       : linear.kind == BF16 ? tiles<BF16>
                                             : tiles<FP32>;
      run(linear, panel, step.words, step.scales, out, first, stop);
    }
}

// x (N, in), or the rows of it that `chosen` names, through `norm` if there is one.
void product(const Linear &linear, const Step &step, const float *x, const Norm *norm,
             const int32_t *chosen, int rows, const Output &out) {
#pragma omp for schedule(static)
  for (int row = 0; row < rows; ++row) {
    const float *from = x + (size_t)(chosen ? chosen[row] : row) * linear.in;
    thread_local std::vector<float> normed;
    if (norm && norm->weight) {
      normed.resize(linear.in);
      normalise(from, *norm, linear.in, normed.data());
      from = normed.data();
    }
    int32_t *to = step.words + row * row_words(linear);
    step.scales[row] = to_words(from, linear.in, linear.kind, to);
  }
  multiply(linear, step, rows, out);
}

// One head of one row, q (E), over `count` keys and values (count, E) -> out (E).
template <typename T>
void attend(const float *q, const T *keys, const T *values, const T *next_keys, int count, int E,
            float *out) {
  thread_local std::vector<float> weights;
  weights.resize(count + LANES);
  float *const w = weights.data();
  for (int t = 0; t < count; ++t) {
    fetch(values + (size_t)t * E, E);
    Floats sum = _mm512_setzero_ps();
    for (int e = 0; e < E; e += LANES) {
      const __mmask16 mask = lanes(E - e);
      sum = _mm512_fmadd_ps(load(q + e, mask), load(keys + (size_t)t * E + e, mask), sum);
    }
    w[t] = _mm512_reduce_add_ps(sum);
  }
  for (int t = count; t < count + LANES; ++t) w[t] = -INFINITY;
  Floats most = _mm512_set1_ps(-INFINITY), total = _mm512_setzero_ps();
  for (int t = 0; t < count; t += LANES) most = _mm512_max_ps(most, load(w + t, 0xFFFF));
  most = _mm512_set1_ps(_mm512_reduce_max_ps(most));
  for (int t = 0; t < count; t += LANES) {
    const Floats e = exp(_mm512_sub_ps(load(w + t, 0xFFFF), most));
    total = _mm512_mask_add_ps(total, lanes(count - t), total, e);
    store(w + t, e, 0xFFFF);
  }
  const Floats inverse = _mm512_set1_ps(1.f / _mm512_reduce_add_ps(total));
  for (int e = 0; e < E; e += PANEL) {
    Floats sums[BLOCKS] = {};
    for (int t = 0; t < count; ++t) {
      if (next_keys && e == 0) fetch(next_keys + (size_t)t * E, E);
      const Floats weight = _mm512_set1_ps(w[t]);
      for (int b = 0; b < BLOCKS; ++b) {
        const int at = e + b * LANES;
        if (at >= E) continue;
        const Floats value = load(values + (size_t)t * E + at, lanes(E - at));
        sums[b] = _mm512_fmadd_ps(weight, value, sums[b]);
      }
    }
    for (int b = 0; b < BLOCKS && e + b * LANES < E; ++b) {
      const int at = e + b * LANES;
      store(out + at, _mm512_mul_ps(sums[b], inverse), lanes(E - at));
    }
  }
}

// Store the keys and values of step.wide (N, 3 C); every row attends up to its own position.
template <typename T>
void attention(const Model &model, const Step &step, const Cache &cache, int layer) {
  const int C = model.n_embd, H = model.n_head, E = C / H;
  const size_t head = (size_t)cache.length * E;
  T *keys = (T *)cache.keys[layer], *values = (T *)cache.values[layer];
#pragma omp for schedule(static)
  for (int row = 0; row < step.rows; ++row)
    for (int h = 0; h < H; ++h) {
      const float *k = step.wide + (size_t)row * 3 * C + C + h * E, *v = k + C;
      const size_t to = ((size_t)step.slots[row] * H + h) * head + (size_t)step.positions[row] * E;
      for (int e = 0; e < E; e += LANES) {
        store(keys + to + e, load(k + e, lanes(E - e)), lanes(E - e));
        store(values + to + e, load(v + e, lanes(E - e)), lanes(E - e));
      }
    }
#pragma omp for collapse(2) schedule(dynamic, 4)
  for (int row = 0; row < step.rows; ++row)
    for (int h = 0; h < H; ++h) {
      const float *q = step.wide + (size_t)row * 3 * C + h * E;
      const T *k = keys + ((size_t)step.slots[row] * H + h) * head;
      const T *v = values + (k - keys), *next = h + 1 < H ? k + head : nullptr;
      attend(q, k, v, next, step.positions[row] + 1, E, step.attended + (size_t)row * C + h * E);
    }
}

void embed(const Model &model, const Step &step) {
  const int C = model.n_embd;
#pragma omp for schedule(static)
  for (int row = 0; row < step.rows; ++row) {
    const float *token = model.wte + (size_t)step.tokens[row] * C;
    const float *position = model.wpe + (size_t)step.positions[row] * C;
    for (int i = 0; i < C; ++i) step.x[(size_t)row * C + i] = token[i] + position[i];
  }
}

void block(const Model &model, const Step &step, const Cache &cache, int layer) {
  const Block &b = model.blocks[layer];
  const int C = model.n_embd, N = step.rows;
  const float *residual = model.residual ? step.x : nullptr;
  product(b.c_attn, step, step.x, &b.ln_1, nullptr, N, {step.wide, nullptr, b.c_attn.out, false});
  (cache.kind == BF16 ? attention<uint16_t> : attention<float>)(model, step, cache, layer);
  product(b.attn_proj, step, step.attended, nullptr, nullptr, N, {step.x, residual, C, false});
  product(b.c_fc, step, step.x, &b.ln_2, nullptr, N, {step.wide, nullptr, b.c_fc.out, true});
  product(b.mlp_proj, step, step.wide, nullptr, nullptr, N, {step.x, residual, C, false});
}

// --- candidates

// Larger for what is likelier, and of equals for the lower id; as sampling.py orders them.
inline int64_t rank_key(float logit, int id) {
  int32_t bits;
  logit += 0.f;  // -0 is 0
  std::memcpy(&bits, &logit, sizeof bits);
  const int32_t order = bits ^ ((bits >> 31) & 0x7FFFFFFF);
  return (int64_t)order << 32 | (0x7FFFFFFF - id);
}

// The k first of a row of `width` logits. They are no less than the k-th of the panels' maxima.
void top_of_row(const float *logits, int width, int k, float *values, int64_t *ids) {
  std::vector<float> maxima;
  for (int i = 0; i < width; i += PANEL) {
    Floats most = _mm512_set1_ps(-INFINITY);
    for (int j = i; j < std::min(i + PANEL, width); j += LANES) {
      const __mmask16 mask = lanes(width - j);
      most = _mm512_mask_max_ps(most, mask, load(logits + j, mask), most);
    }
    maxima.push_back(_mm512_reduce_max_ps(most));
  }
  float least = -INFINITY;
  if ((int)maxima.size() >= k) {
    std::nth_element(maxima.begin(), maxima.begin() + k - 1, maxima.end(), std::greater<float>());
    least = maxima[k - 1];
  }
  std::vector<int64_t> keys;
  const Floats lowest = _mm512_set1_ps(-INFINITY);
  for (int i = 0; i < width; i += LANES) {
    const __mmask16 mask = lanes(width - i);
    const Floats row = load(logits + i, mask);
    // "Not less" takes NaN too: the sampler is to see it. -inf waits: a masked row is full of it.
    int found = _mm512_mask_cmp_ps_mask(mask, row, _mm512_set1_ps(least), _CMP_NLT_UQ);
    found &= _mm512_mask_cmp_ps_mask(mask, row, lowest, _CMP_NEQ_UQ);
    for (; found; found &= found - 1) {
      const int id = i + __builtin_ctz(found);
      keys.push_back(rank_key(logits[id], id));
    }
  }
  for (int id = 0; (int)keys.size() < k; ++id)
    if (logits[id] == -INFINITY) keys.push_back(rank_key(logits[id], id));
  std::partial_sort(keys.begin(), keys.begin() + k, keys.end(), std::greater<int64_t>());
  for (int i = 0; i < k; ++i) {
    ids[i] = 0x7FFFFFFF - (keys[i] & 0xFFFFFFFF);
    values[i] = logits[ids[i]];
  }
}

}  // namespace

// The k likeliest of each row of logits (rows, width) and their ids, (rows, k) each.
extern "C" void top(const float *logits, int32_t rows, int32_t width, int32_t k, float *values,
                    int64_t *ids, int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int row = 0; row < rows; ++row) {
    const size_t at = (size_t)row * k;
    top_of_row(logits + (size_t)row * width, width, k, values + at, ids + at);
  }
}

extern "C" void step(const Model *model, const Cache *cache, const Step *step, int32_t threads) {
#pragma omp parallel num_threads(threads)
  {
    embed(*model, *step);
    for (int layer = 0; layer < model->n_layer; ++layer) block(*model, *step, *cache, layer);
    product(model->head, *step, step->x, &model->ln_f, step->asked, step->asked_rows,
            {step->logits, nullptr, step->logits_stride, false});
  }
}
