// Numbers as they are stored, float32 or bf16, and vectors of sixteen floats to compute with.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Integers __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

constexpr int64_t kLanes = 16;

inline Floats load_floats(const float* place) {
  Floats found;
  std::memcpy(&found, place, sizeof(found));
  return found;
}

struct Float32 {
  typedef float Value;
  static inline Floats load(const float* place) { return load_floats(place); }
  static inline void store(float* place, Floats values) { std::memcpy(place, &values, sizeof(values)); }
  static inline float get(float value) { return value; }
  static inline float put(float value) { return value; }
  // sums += sixteen weights times an input
  static inline void add(Floats& sums, Words weights, uint32_t word) {
    float input;
    std::memcpy(&input, &word, 4);
    sums += (Floats)weights * input;
  }
};

struct Bf16 {
  typedef uint16_t Value;
  static inline Floats load(const uint16_t* place) {
    Halves halves;
    std::memcpy(&halves, place, sizeof(halves));
    return (Floats)(__builtin_convertvector(halves, Words) << 16);
  }
  static inline void store(uint16_t* place, Floats values) {  // see put
    const Words bits = (Words)values, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Words found = values != values ? Words{} + 0x7fc0 : rounded;
    const Halves halves = __builtin_convertvector(found, Halves);
    std::memcpy(place, &halves, sizeof(halves));
  }
  static inline float get(uint16_t value) {
    const uint32_t bits = uint32_t(value) << 16;
    float found;
    std::memcpy(&found, &bits, 4);
    return found;
  }
  static inline uint16_t put(float value) {  // to the nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    bits = value != value ? 0x7fc00000u : bits + 0x7fff + ((bits >> 16) & 1);
    return uint16_t(bits >> 16);
  }
  // sums += sixteen pairs of weights times a pair of inputs
  static inline void add(Floats& sums, Words weights, uint32_t word) {
#ifdef __AVX512BF16__
    sums = (Floats)_mm512_dpbf16_ps((__m512)sums, (__m512bh)weights, (__m512bh)_mm512_set1_epi32(word));
#else
    const uint32_t first = word << 16, second = word & 0xffff0000u;
    float inputs[2];
    std::memcpy(inputs, &first, 4);
    std::memcpy(inputs + 1, &second, 4);
    sums += (Floats)(weights << 16) * inputs[0];
    sums += (Floats)(weights & 0xffff0000u) * inputs[1];
#endif
  }
};

// Up to sixteen numbers, zeros behind them.
template <typename Number>
inline Floats load_some(const typename Number::Value* place, int64_t count) {
  if (count >= kLanes) return Number::load(place);
  typename Number::Value padded[kLanes] = {};
  std::memcpy(padded, place, count * sizeof(*place));
  return Number::load(padded);
}

template <typename Number>
inline void store_some(typename Number::Value* place, Floats values, int64_t count) {
  if (count >= kLanes) return Number::store(place, values);
  typename Number::Value padded[kLanes];
  Number::store(padded, values);
  std::memcpy(place, padded, count * sizeof(*place));
}

inline float sum_of(Floats values) {
  float total = 0;
  for (int64_t lane = 0; lane < kLanes; ++lane) total += values[lane];
  return total;
}

// e^x for x <= 0: 2^n by its bits, the rest of the exponent by a polynomial (relative error below 2e-7).
inline Floats exponential(Floats x) {
  const Floats least = Floats{} - 87.0f, half = Floats{} - 0.5f;
  x = x < least ? least : x;
  const Integers n = __builtin_convertvector(x * 1.44269504f + half, Integers);
  const Floats whole = __builtin_convertvector(n, Floats);
  const Floats r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * (Floats)((n + 127) << 23);
}

inline Floats size_of(Floats x) { return (Floats)((Words)x & 0x7fffffffu); }

// As tiled_linear.py numbers them.
enum Activation : int64_t { kNone, kGelu, kGeluTanh, kRelu, kSilu, kSquaredRelu };

// 1/2 (1 + erf(x / sqrt 2)), by Abramowitz and Stegun 7.1.26: error below 1e-7.
inline Floats normal_share(Floats x) {
  const Floats z = size_of(x) * 0.70710678f, t = 1.0f / (1.0f + z * 0.3275911f);
  Floats p = t * 1.061405429f - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const Floats tail = p * t * exponential(-z * z) * 0.5f;
  return x < 0.0f ? tail : 1.0f - tail;
}

inline Floats sigmoid(Floats x) {
  const Floats e = exponential(-size_of(x));
  return (x < 0.0f ? e : Floats{} + 1.0f) / (1.0f + e);
}

inline Floats activated(Floats x, int64_t activation) {
  const Floats zero = {};
  switch (activation) {
    case kGelu: return x * normal_share(x);
    case kGeluTanh: return x * sigmoid(1.59576912f * (x + 0.044715f * x * x * x));
    case kRelu: return x < 0.0f ? zero : x;  // not a number stays so
    case kSilu: return x * sigmoid(x);
    case kSquaredRelu: x = x < 0.0f ? zero : x; return x * x;
    default: return x;
  }
}

}  // namespace
