// A matrix in few bits, as quantized_linears.py lays it out, and what comes after a product with it.
//
// Codes lie in tiles of 32 outputs. A vector holds 4 bytes of each of 16 outputs: 4 inputs of 8 bits, or 8
// of 4 bits, inputs k..k+3 in the low halves and k+4..k+7 in the high ones. They are stored unsigned
// (code + middle).

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int64_t kTile = 32;  // outputs
constexpr int64_t kMostRows = 8;  // of one pass over a tile: 16 sums stay in registers
constexpr int64_t kAhead = 1536;  // bytes that are asked for before they are needed

struct Matrix {
  int64_t outputs, inputs, padded, groups, group;  // padded = groups * group
  const uint8_t* codes;
  const void* scales;  // [tiles][groups][32], float or bf16
  bool has_bf16_scales;
  const uint8_t* zeros;  // likewise, or null
  const float* bias;  // [outputs], or null
};

struct Outputs {
  void* values;  // [rows][outputs]
  const void* other;  // likewise, or null
  bool is_sum, is_bf16;
};

inline __m512 from_bf16(__m256i half) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

inline __m256i to_bf16(__m512 values) {  // to the nearest, ties to even
  const __m512i bits = _mm512_castps_si512(values);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}

inline __m512 scales_at(const Matrix& m, int64_t place) {
  if (!m.has_bf16_scales) return _mm512_loadu_ps(static_cast<const float*>(m.scales) + place);
  const uint16_t* half = static_cast<const uint16_t*>(m.scales) + place;
  return from_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(half)));
}

inline __m512i zeros_at(const Matrix& m, int64_t place) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(m.zeros + place)));
}

inline float from_bf16(uint16_t half) {
  const uint32_t bits = uint32_t(half) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline void ask_ahead(const uint8_t* codes) {
  _mm_prefetch(reinterpret_cast<const char*>(codes) + kAhead, _MM_HINT_T0);
  _mm_prefetch(reinterpret_cast<const char*>(codes) + kAhead + 64, _MM_HINT_T0);
}

// A row as float32, filled up with zeros.
inline void widen(const void* row, bool is_bf16, const Matrix& m, float* wide) {
  std::fill(wide + m.inputs, wide + m.padded, 0.0f);
  if (!is_bf16) {
    std::memcpy(wide, row, m.inputs * sizeof(float));
    return;
  }
  for (int64_t i = 0; i < m.inputs; ++i) wide[i] = from_bf16(static_cast<const uint16_t*>(row)[i]);
}

// Up to 16 outputs of a row, from ``first`` on.
inline void store(__m512 values, const Matrix& m, const Outputs& out, int64_t row, int64_t first) {
  const int64_t count = std::min<int64_t>(16, m.outputs - first);
  if (count <= 0) return;
  const __mmask16 mask = __mmask16((1u << count) - 1);
  if (m.bias) values = _mm512_add_ps(values, _mm512_maskz_loadu_ps(mask, m.bias + first));
  const int64_t place = row * m.outputs + first;
  if (out.other) {
    const __m512 other =
        out.is_bf16 ? from_bf16(_mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(out.other) + place))
                    : _mm512_maskz_loadu_ps(mask, static_cast<const float*>(out.other) + place);
    values = out.is_sum ? _mm512_add_ps(values, other) : _mm512_mul_ps(values, other);
  }
  if (out.is_bf16) {
    _mm256_mask_storeu_epi16(static_cast<uint16_t*>(out.values) + place, mask, to_bf16(values));
  } else {
    _mm512_mask_storeu_ps(static_cast<float*>(out.values) + place, mask, values);
  }
}

// A tile by all rows: ``Tile::template run<n>(tile, first_row)`` does n of them.
template <int kRows, typename Tile>
void rows_of_tile(const Tile& product, int64_t tile, int64_t row, int64_t left) {
  if constexpr (kRows > 1) {
    if (left < kRows) return rows_of_tile<kRows - 1>(product, tile, row, left);
  }
  product.template run<kRows>(tile, row);
  if (left > kRows) rows_of_tile<kRows>(product, tile, row + kRows, left - kRows);
}

// Memory of a thread that calls, kept from call to call.
template <typename Value>
Value* scratch(std::vector<Value>& memory, int64_t size) {
  if (int64_t(memory.size()) < size) memory.resize(size);
  return memory.data();
}

}  // namespace
