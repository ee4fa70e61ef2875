// A matrix in few bits, as quantized_linears.py lays it out, and what comes after a product with it.
//
// Codes lie in tiles of 32 outputs. A vector holds 4 bytes of each of 16 outputs: 4 inputs of 8 bits, or 8
// of 4 bits, inputs k..k+3 in the low halves and k+4..k+7 in the high ones. They are stored unsigned
// (code + middle).

#pragma once

#include <immintrin.h>

#include "call.h"
#include "outputs.h"

namespace {

// As quantized_linears.py fills it in.
struct Matrix {
  const uint8_t* codes;
  const void* scales;  // [tiles][groups][32], float or bf16
  const uint8_t* zeros;  // likewise, or null
  const float* bias;  // [outputs], or null
  int64_t outputs, inputs, groups, group, is_int4, has_bf16_scales;
  int64_t padded() const { return groups * group; }
  int64_t tiles() const { return (outputs + kTile - 1) / kTile; }
};

inline __m512 scales_at(const Matrix& m, int64_t place) {
  if (!m.has_bf16_scales) return _mm512_loadu_ps(static_cast<const float*>(m.scales) + place);
  return (__m512)Bf16::load(static_cast<const uint16_t*>(m.scales) + place);
}

inline __m512i zeros_at(const Matrix& m, int64_t place) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(m.zeros + place)));
}

inline void ask_ahead(const uint8_t* codes) {
  _mm_prefetch(reinterpret_cast<const char*>(codes) + kAhead, _MM_HINT_T0);
  _mm_prefetch(reinterpret_cast<const char*>(codes) + kAhead + 64, _MM_HINT_T0);
}

// A row as float32, filled up with zeros.
inline void widen(const void* row, bool is_bf16, const Matrix& m, float* wide) {
  std::fill(wide + m.inputs, wide + m.padded(), 0.0f);
  if (!is_bf16) {
    std::memcpy(wide, row, m.inputs * sizeof(float));
    return;
  }
  for (int64_t i = 0; i < m.inputs; ++i) wide[i] = Bf16::get(static_cast<const uint16_t*>(row)[i]);
}

inline void finish(const __m512 (&sums)[2], const Matrix& m, const Call& call, int64_t row, int64_t tile) {
  const Outputs out{call.values, call.activation, call.other, bool(call.is_sum)};
  for (int64_t half = 0; half < 2; ++half) {
    const Floats found = (Floats)sums[half];
    const int64_t first = tile * kTile + half * kLanes;
    if (call.is_bf16) {
      finish<Bf16>(found, m.bias, out, m.outputs, row, first);
    } else {
      finish<Float32>(found, m.bias, out, m.outputs, row, first);
    }
  }
}

// Memory of a thread, kept from call to call.
template <typename Value>
Value* scratch(std::vector<Value>& memory, int64_t size) {
  if (int64_t(memory.size()) < size) memory.resize(size);
  return memory.data();
}

}  // namespace
