// Rows by a matrix in few bits: outputs = (rows rounded to 8 bits) * codes, summed in integers.
//
// vpdpbusd multiplies four inputs of 16 outputs by the same four inputs of a row and adds to 16 sums. What
// the codes' being unsigned adds is taken off again through the sum of each row's group. Integer sums are
// exact in any order, groups are added in their order: a row's outputs do not depend on other rows nor on
// the number of threads.

#include "quantized_matrix.h"

#if !defined(__AVX512VNNI__) || !defined(__AVX512BW__)
#error "needs AVX-512 with VNNI"
#endif

namespace {

struct Rows {
  float* scales;  // [rows]
  int32_t* sums;  // [rows][groups]
  int8_t* codes;  // [rows][padded]
  Rows(const Matrix& m, const Call& call)
      : scales(static_cast<float*>(call.space)),
        sums(reinterpret_cast<int32_t*>(scales + call.rows)),
        codes(reinterpret_cast<int8_t*>(sums + call.rows * m.groups)) {}
};

inline __m512i four_inputs(const int8_t* place) {
  int32_t four;
  std::memcpy(&four, place, 4);
  return _mm512_set1_epi32(four);
}

// One row to 8 bits under its own scale, and the sum of each of its groups.
void round_row(const void* row, bool is_bf16, const Matrix& m, int8_t* codes, int32_t* sums, float* scale) {
  static thread_local std::vector<float> memory;
  float* copy = scratch(memory, m.padded());
  widen(row, is_bf16, m, copy);
  __m512 largest = _mm512_setzero_ps();
  int64_t i = 0;
  for (; i + 16 <= m.padded(); i += 16) {
    largest = _mm512_max_ps(largest, _mm512_abs_ps(_mm512_loadu_ps(copy + i)));
  }
  float most = _mm512_reduce_max_ps(largest);
  for (; i < m.padded(); ++i) most = std::max(most, std::fabs(copy[i]));
  *scale = std::max(most / 127.0f, 1e-12f);
  const __m512 divisor = _mm512_set1_ps(*scale);
  for (i = 0; i + 16 <= m.padded(); i += 16) {
    const __m512i whole = _mm512_cvtps_epi32(_mm512_div_ps(_mm512_loadu_ps(copy + i), divisor));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + i), _mm512_cvtsepi32_epi8(whole));
  }
  for (; i < m.padded(); ++i) codes[i] = int8_t(std::nearbyint(copy[i] / *scale));
  for (int64_t g = 0; g < m.groups; ++g) {
    int32_t sum = 0;
    for (int64_t k = 0; k < m.group; ++k) sum += codes[g * m.group + k];
    sums[g] = sum;
  }
}

template <bool kIsInt4>
struct Tiles {
  const Matrix& m;
  const Rows& rows;
  const Call& call;

  template <int kRows>
  void run(int64_t tile, int64_t first_row) const {
    constexpr int kInputs = kIsInt4 ? 8 : 4;  // of one vector
    const uint8_t* codes = m.codes + tile * kTile * m.padded() / (kIsInt4 ? 2 : 1);
    const __m512i low_half = _mm512_set1_epi8(15);
    const int8_t* own[kRows];
    for (int r = 0; r < kRows; ++r) own[r] = rows.codes + (first_row + r) * m.padded();
    __m512 sums[kRows][2];
    for (auto& pair : sums) pair[0] = pair[1] = _mm512_setzero_ps();
    for (int64_t g = 0; g < m.groups; ++g) {
      __m512i whole[kRows][2];
      for (int r = 0; r < kRows; ++r) {
        const int32_t sum = rows.sums[(first_row + r) * m.groups + g];
        whole[r][0] = whole[r][1] = _mm512_set1_epi32(m.zeros ? 0 : -(kIsInt4 ? 8 : 128) * sum);
      }
      for (int64_t k = g * m.group; k < (g + 1) * m.group; k += kInputs, codes += 128) {
        if constexpr (kIsInt4 && kRows > 1) ask_ahead(codes);  // otherwise the processor does so by itself
        const __m512i left = _mm512_loadu_si512(codes), right = _mm512_loadu_si512(codes + 64);
        if constexpr (kIsInt4) {
          const __m512i left_low = _mm512_and_si512(left, low_half);
          const __m512i right_low = _mm512_and_si512(right, low_half);
          const __m512i left_high = _mm512_and_si512(_mm512_srli_epi16(left, 4), low_half);
          const __m512i right_high = _mm512_and_si512(_mm512_srli_epi16(right, 4), low_half);
#pragma GCC unroll 8
          for (int r = 0; r < kRows; ++r) {
            const __m512i one = four_inputs(own[r] + k), two = four_inputs(own[r] + k + 4);
            whole[r][0] = _mm512_dpbusd_epi32(whole[r][0], left_low, one);
            whole[r][1] = _mm512_dpbusd_epi32(whole[r][1], right_low, one);
            whole[r][0] = _mm512_dpbusd_epi32(whole[r][0], left_high, two);
            whole[r][1] = _mm512_dpbusd_epi32(whole[r][1], right_high, two);
          }
        } else {
#pragma GCC unroll 8
          for (int r = 0; r < kRows; ++r) {
            const __m512i four = four_inputs(own[r] + k);
            whole[r][0] = _mm512_dpbusd_epi32(whole[r][0], left, four);
            whole[r][1] = _mm512_dpbusd_epi32(whole[r][1], right, four);
          }
        }
      }
      for (int half = 0; half < 2; ++half) {
        const int64_t place = (tile * m.groups + g) * kTile + half * 16;
        const __m512 scale = scales_at(m, place);
        if (m.zeros) {
          const __m512i zero = zeros_at(m, place);
          for (int r = 0; r < kRows; ++r) {
            const __m512i row_sum = _mm512_set1_epi32(rows.sums[(first_row + r) * m.groups + g]);
            whole[r][half] = _mm512_sub_epi32(whole[r][half], _mm512_mullo_epi32(zero, row_sum));
          }
        }
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          sums[r][half] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole[r][half]), scale, sums[r][half]);
        }
      }
    }
    for (int r = 0; r < kRows; ++r) {
      const __m512 scale = _mm512_set1_ps(rows.scales[first_row + r]);
      const __m512 found[2] = {_mm512_mul_ps(sums[r][0], scale), _mm512_mul_ps(sums[r][1], scale)};
      finish(found, m, call, first_row + r, tile);
    }
  }
};

template <bool kIsInt4>
void share(const Matrix& m, const Call& call) {
  const Rows rows(m, call);
  const Tiles<kIsInt4> tiles{m, rows, call};
  const int64_t row_bytes = m.inputs * (call.is_bf16 ? 2 : 4);
#pragma omp for schedule(static)
  for (int64_t row = 0; row < call.rows; ++row) {
    round_row(static_cast<const char*>(call.inputs) + row * row_bytes, call.is_bf16, m,
              rows.codes + row * m.padded(), rows.sums + row * m.groups, rows.scales + row);
  }
  // Small shares until all is done: a thread whose core has other work delays nobody.
#pragma omp for schedule(dynamic, 2)
  for (int64_t tile = 0; tile < m.tiles(); ++tile) {
    by_rows(0, call.rows, [&](auto count, int64_t row) { tiles.template run<count()>(tile, row); });
  }
}

void share_any(const void* matrix, const Call* call) {
  const Matrix& m = *static_cast<const Matrix*>(matrix);
  (m.is_int4 ? share<true> : share<false>)(m, *call);
}

}  // namespace

// See ``Product`` in call.h.
extern "C" void mtnlg_integer_product(const void* matrix, const Call* call, int64_t threads) {
  if (threads == 0) return share_any(matrix, call);
#pragma omp parallel num_threads(threads)
  share_any(matrix, call);
}
