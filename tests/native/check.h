// What the tests of the native library's headers share: checks, random numbers, bf16 and fp16.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

struct Test {
  const char *file, *name;
  void (*run)();
};

inline std::vector<Test> &all_tests() {
  static std::vector<Test> tests;
  return tests;
}

#define TEST(name)                                                                         \
  static void name();                                                                      \
  static const bool added_##name = (all_tests().push_back({__FILE__, #name, name}), true); \
  static void name()

#define CHECK(condition)                                                   \
  do {                                                                     \
    if (!(condition)) {                                                    \
      std::printf("%s:%d: %s is false\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                        \
    }                                                                      \
  } while (false)

#define CHECK_CLOSE(ours, exact, off)                                                        \
  do {                                                                                       \
    const double mine = (ours), theirs = (exact);                                            \
    if (!(std::fabs(mine - theirs) <= (off))) {                                              \
      std::printf("%s:%d: %s is %.9g, not %.9g\n", __FILE__, __LINE__, #ours, mine, theirs); \
      std::exit(1);                                                                          \
    }                                                                                        \
  } while (false)

// Numbers of a normal distribution.
inline std::vector<float> randoms(size_t count, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<float> numbers(count);
  for (float &number : numbers) number = normal(generator);
  return numbers;
}

// Of a finite number.
inline float from_fp16(uint16_t half) {
  const int exponent = half >> 10 & 31, rest = half & 1023;
  const float size = exponent ? std::ldexp(1024 + rest, exponent - 25) : std::ldexp(rest, -24);
  return half >> 15 ? -size : size;
}

// Rounded to the nearest, of two to the even one; of less than 65504.
inline uint16_t fp16(float value) {
  const float size = std::fabs(value);
  const int exponent = size < 0x1p-14f ? -14 : std::ilogb(size);
  const int rest = std::nearbyint(std::ldexp(size, 10 - exponent));  // 1024 or more, unless tiny
  return (value < 0) << 15 | (((exponent + 14) << 10) + rest);
}

inline float from_bf16(uint16_t half) {
  const uint32_t bits = (uint32_t)half << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Rounded to the nearest, of two to the even one.
inline uint16_t bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
}

inline std::vector<uint16_t> bf16(const std::vector<float> &values) {
  std::vector<uint16_t> halves;
  for (const float value : values) halves.push_back(bf16(value));
  return halves;
}

inline double scalar_gelu(double z) {
  return 0.5 * z * (1 + std::tanh(std::sqrt(2 / M_PI) * (z + 0.044715 * z * z * z)));
}
