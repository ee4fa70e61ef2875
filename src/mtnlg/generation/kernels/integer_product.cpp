// Rows by a matrix in few bits: outputs = (rows rounded to 8 bits) * codes, summed in integers.
//
// Codes lie in tiles of 32 outputs. Four inputs of 16 outputs fill a vector, which vpdpbusd multiplies by
// the same four inputs of a row and adds to 16 sums; codes of 4 bits come two to a byte, inputs k..k+3 in
// the low halves and k+4..k+7 in the high ones. Codes are stored unsigned (code + middle), and what that
// adds is taken off again through the sum of each row's group. Integer sums are exact in any order, groups
// are added in their order: a row's outputs do not depend on other rows nor on the number of threads.

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if !defined(__AVX512VNNI__) || !defined(__AVX512BW__)
#error "needs AVX-512 with VNNI"
#endif

namespace {

constexpr int64_t kTile = 32;  // outputs
constexpr int64_t kMostRows = 4;  // of one pass over a tile: 8 integer and 8 float sums stay in registers

struct Matrix {
  int64_t outputs, inputs, padded, groups, group;  // padded = groups * group
  const uint8_t* codes;
  const void* scales;  // [tiles][groups][32]
  const uint8_t* zeros;  // likewise, or null
  const float* bias;  // [outputs], or null
};

struct Rows {
  const int8_t* codes;  // [rows][padded]
  const int32_t* sums;  // [rows][groups]
  const float* scales;  // [rows]
};

struct Outputs {
  void* values;  // [rows][outputs]
  const void* other;  // likewise, or null
  bool is_sum, is_bf16;
};

inline __m512 from_bf16(const void* place) {
  const __m256i half = _mm256_loadu_si256(static_cast<const __m256i*>(place));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

inline __m256i to_bf16(__m512 values) {  // to the nearest, ties to even
  const __m512i bits = _mm512_castps_si512(values);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}

inline __m512 load_scales(const float* place) { return _mm512_loadu_ps(place); }
inline __m512 load_scales(const uint16_t* place) { return from_bf16(place); }

inline __m512i four_inputs(const int8_t* place) {
  int32_t four;
  std::memcpy(&four, place, 4);
  return _mm512_set1_epi32(four);
}

// One row to 8 bits under its own scale, and the sum of each of its groups.
void round_row(const void* row, bool is_bf16, const Matrix& m, int8_t* codes, int32_t* sums, float* scale) {
  std::vector<float> copy(m.padded, 0.0f);
  if (is_bf16) {
    const uint16_t* half = static_cast<const uint16_t*>(row);
    for (int64_t i = 0; i < m.inputs; ++i) {
      const uint32_t bits = uint32_t(half[i]) << 16;
      std::memcpy(&copy[i], &bits, 4);
    }
  } else {
    std::memcpy(copy.data(), row, m.inputs * sizeof(float));
  }
  __m512 largest = _mm512_setzero_ps();
  int64_t i = 0;
  for (; i + 16 <= m.padded; i += 16) {
    largest = _mm512_max_ps(largest, _mm512_abs_ps(_mm512_loadu_ps(&copy[i])));
  }
  float most = _mm512_reduce_max_ps(largest);
  for (; i < m.padded; ++i) most = std::max(most, std::fabs(copy[i]));
  *scale = std::max(most / 127.0f, 1e-12f);
  const __m512 divisor = _mm512_set1_ps(*scale);
  for (i = 0; i + 16 <= m.padded; i += 16) {
    const __m512i whole = _mm512_cvtps_epi32(_mm512_div_ps(_mm512_loadu_ps(&copy[i]), divisor));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + i), _mm512_cvtsepi32_epi8(whole));
  }
  for (; i < m.padded; ++i) codes[i] = int8_t(std::nearbyint(copy[i] / *scale));
  for (int64_t g = 0; g < m.groups; ++g) {
    int32_t sum = 0;
    for (int64_t k = 0; k < m.group; ++k) sum += codes[g * m.group + k];
    sums[g] = sum;
  }
}

void store(__m512 sums, const Matrix& m, const Outputs& out, int64_t row, int64_t first, float scale) {
  const int64_t count = std::min<int64_t>(16, m.outputs - first);
  if (count <= 0) return;
  const __mmask16 mask = __mmask16((1u << count) - 1);
  __m512 values = _mm512_mul_ps(sums, _mm512_set1_ps(scale));
  if (m.bias) values = _mm512_add_ps(values, _mm512_maskz_loadu_ps(mask, m.bias + first));
  const int64_t place = row * m.outputs + first;
  if (out.other) {
    __m512 other;
    if (out.is_bf16) {
      const __m256i half = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(out.other) + place);
      other = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
    } else {
      other = _mm512_maskz_loadu_ps(mask, static_cast<const float*>(out.other) + place);
    }
    values = out.is_sum ? _mm512_add_ps(values, other) : _mm512_mul_ps(values, other);
  }
  if (out.is_bf16) {
    _mm256_mask_storeu_epi16(static_cast<uint16_t*>(out.values) + place, mask, to_bf16(values));
  } else {
    _mm512_mask_storeu_ps(static_cast<float*>(out.values) + place, mask, values);
  }
}

template <bool kIsInt4, bool kHasZeros, typename Scale, int kRows>
void tile_by_rows(const Matrix& m, const Rows& rows, const Outputs& out, int64_t tile, int64_t first_row) {
  constexpr int kInputs = kIsInt4 ? 8 : 4;  // of one vector
  const uint8_t* codes = m.codes + tile * kTile * m.padded / (kIsInt4 ? 2 : 1);
  const Scale* scales = static_cast<const Scale*>(m.scales) + tile * m.groups * kTile;
  const uint8_t* zeros = kHasZeros ? m.zeros + tile * m.groups * kTile : nullptr;
  const __m512i low_half = _mm512_set1_epi8(15);
  const int8_t* own[kRows];
  for (int r = 0; r < kRows; ++r) own[r] = rows.codes + (first_row + r) * m.padded;
  __m512 sums[kRows][2];
  for (auto& pair : sums) pair[0] = pair[1] = _mm512_setzero_ps();
  for (int64_t g = 0; g < m.groups; ++g) {
    __m512i whole[kRows][2];
    for (int r = 0; r < kRows; ++r) {
      const int32_t sum = rows.sums[(first_row + r) * m.groups + g];
      whole[r][0] = whole[r][1] = _mm512_set1_epi32(kHasZeros ? 0 : -(kIsInt4 ? 8 : 128) * sum);
    }
    for (int64_t k = g * m.group; k < (g + 1) * m.group; k += kInputs, codes += 128) {
      const __m512i left = _mm512_loadu_si512(codes), right = _mm512_loadu_si512(codes + 64);
      if constexpr (kIsInt4) {
        const __m512i left_low = _mm512_and_si512(left, low_half);
        const __m512i right_low = _mm512_and_si512(right, low_half);
        const __m512i left_high = _mm512_and_si512(_mm512_srli_epi16(left, 4), low_half);
        const __m512i right_high = _mm512_and_si512(_mm512_srli_epi16(right, 4), low_half);
        for (int r = 0; r < kRows; ++r) {
          const __m512i one = four_inputs(own[r] + k), two = four_inputs(own[r] + k + 4);
          whole[r][0] = _mm512_dpbusd_epi32(whole[r][0], left_low, one);
          whole[r][1] = _mm512_dpbusd_epi32(whole[r][1], right_low, one);
          whole[r][0] = _mm512_dpbusd_epi32(whole[r][0], left_high, two);
          whole[r][1] = _mm512_dpbusd_epi32(whole[r][1], right_high, two);
        }
      } else {
        for (int r = 0; r < kRows; ++r) {
          const __m512i four = four_inputs(own[r] + k);
          whole[r][0] = _mm512_dpbusd_epi32(whole[r][0], left, four);
          whole[r][1] = _mm512_dpbusd_epi32(whole[r][1], right, four);
        }
      }
    }
    for (int half = 0; half < 2; ++half) {
      const __m512 scale = load_scales(scales + g * kTile + half * 16);
      __m512i zero = _mm512_setzero_si512();
      if constexpr (kHasZeros) {
        const uint8_t* place = zeros + g * kTile + half * 16;
        zero = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(place)));
      }
      for (int r = 0; r < kRows; ++r) {
        __m512i sum = whole[r][half];
        if constexpr (kHasZeros) {
          const __m512i row_sum = _mm512_set1_epi32(rows.sums[(first_row + r) * m.groups + g]);
          sum = _mm512_sub_epi32(sum, _mm512_mullo_epi32(zero, row_sum));
        }
        sums[r][half] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, sums[r][half]);
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    const float scale = rows.scales[first_row + r];
    store(sums[r][0], m, out, first_row + r, tile * kTile, scale);
    store(sums[r][1], m, out, first_row + r, tile * kTile + 16, scale);
  }
}

template <bool kIsInt4, bool kHasZeros, typename Scale>
void one_tile(const Matrix& m, const Rows& rows, const Outputs& out, int64_t tile, int64_t num_rows) {
  for (int64_t row = 0; row < num_rows; row += kMostRows) {
    switch (std::min(kMostRows, num_rows - row)) {
      case 1: tile_by_rows<kIsInt4, kHasZeros, Scale, 1>(m, rows, out, tile, row); break;
      case 2: tile_by_rows<kIsInt4, kHasZeros, Scale, 2>(m, rows, out, tile, row); break;
      case 3: tile_by_rows<kIsInt4, kHasZeros, Scale, 3>(m, rows, out, tile, row); break;
      default: tile_by_rows<kIsInt4, kHasZeros, Scale, 4>(m, rows, out, tile, row);
    }
  }
}

using TileFunction = void (*)(const Matrix&, const Rows&, const Outputs&, int64_t, int64_t);

TileFunction tile_function(bool is_int4, bool has_zeros, bool has_bf16_scales) {
  static const TileFunction all[8] = {
      one_tile<false, false, float>, one_tile<false, false, uint16_t>,
      one_tile<false, true, float>,  one_tile<false, true, uint16_t>,
      one_tile<true, false, float>,  one_tile<true, false, uint16_t>,
      one_tile<true, true, float>,   one_tile<true, true, uint16_t>,
  };
  return all[4 * is_int4 + 2 * has_zeros + has_bf16_scales];
}

}  // namespace

// flags: 1 codes of 4 bits, 2 scales in bf16, 4 rows and outputs in bf16, 8 ``other`` is added.
extern "C" void mtnlg_integer_product(const void* inputs, void* values, const void* other, int64_t num_rows,
                                      const uint8_t* codes, const void* scales, const uint8_t* zeros,
                                      const float* bias, int64_t outputs, int64_t num_inputs, int64_t groups,
                                      int64_t group, int64_t flags, int64_t threads) {
  const Matrix m{outputs, num_inputs, groups * group, groups, group, codes, scales, zeros, bias};
  const bool is_bf16 = flags & 4;
  static thread_local std::vector<int8_t> row_codes;
  static thread_local std::vector<int32_t> row_sums;
  static thread_local std::vector<float> row_scales;
  row_codes.resize(std::max<size_t>(row_codes.size(), num_rows * m.padded));
  row_sums.resize(std::max<size_t>(row_sums.size(), num_rows * groups));
  row_scales.resize(std::max<size_t>(row_scales.size(), num_rows));
  int8_t* own_codes = row_codes.data();
  int32_t* own_sums = row_sums.data();
  float* own_scales = row_scales.data();
  const Rows rows{own_codes, own_sums, own_scales};
  const Outputs out{values, other, bool(flags & 8), is_bf16};
  const TileFunction run = tile_function(flags & 1, zeros != nullptr, flags & 2);
  const int64_t tiles = (outputs + kTile - 1) / kTile;
  const int64_t row_bytes = num_inputs * (is_bf16 ? 2 : 4);
#pragma omp parallel num_threads(threads)
  {
#pragma omp for
    for (int64_t row = 0; row < num_rows; ++row) {
      round_row(static_cast<const char*>(inputs) + row * row_bytes, is_bf16, m, own_codes + row * m.padded,
                own_sums + row * groups, own_scales + row);
    }
    // Small shares until all is done: a thread whose core has other work delays nobody.
#pragma omp for schedule(dynamic, 2)
    for (int64_t tile = 0; tile < tiles; ++tile) run(m, rows, out, tile, num_rows);
  }
}
