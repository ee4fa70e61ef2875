// Rows by a matrix in few bits: outputs = rows * codes, rows in floating point, summed in float32.
//
// Codes become numbers in registers: of 4 bits by a table of 16, of 8 bits by putting them into a float's
// mantissa. Both are exact; so is each product where rows are bf16. A group's sum is multiplied by its scale
// and added to the output's: in the order of inputs and groups, so that a row's outputs do not depend on
// other rows nor on the number of threads.

#include "quantized_matrix.h"

#if !defined(__AVX512F__) || !defined(__AVX512BW__)
#error "needs AVX-512"
#endif

namespace {

struct Rows {
  float* sums;  // [rows][groups]
  float* words;  // [rows][steps * 4 bytes], in the order in which vectors are decoded
  Rows(const Matrix& m, const Call& call)
      : sums(static_cast<float*>(call.space)), words(sums + call.rows * m.groups) {}
};

// Each kind says how many inputs lie in a vector of codes, in how many steps they become numbers, how a step
// decodes 16 outputs, and how a row's inputs lie to meet that.

struct Int4Floats {
  static constexpr int kInputs = 8, kSteps = 8;
  static constexpr int kOrder[kInputs] = {0, 4, 1, 5, 2, 6, 3, 7};
  const __m512 table = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);

  template <int kStep>
  __m512 decode(__m512i codes) const {  // of an index, the instruction looks at the lowest 4 bits
    return _mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4 * kStep), table);
  }
};

struct Int8Floats {
  static constexpr int kInputs = 4, kSteps = 4;
  static constexpr int kOrder[kInputs] = {0, 1, 2, 3};
  const __m512i exponent = _mm512_set1_epi32(0x47000000);  // 2^15, in whose mantissa bit 8 is worth 1
  const __m512 middle = _mm512_set1_ps(32768.0f + 128.0f);

  template <int kStep>
  __m512 decode(__m512i codes) const {
    const __m512i place = _mm512_set4_epi32(0x00000c00 + kStep * 256, 0x00000800 + kStep * 256,
                                            0x00000400 + kStep * 256, kStep * 256);
    const __m512i bits = _mm512_mask_shuffle_epi8(exponent, 0x2222222222222222ull, codes, place);
    return _mm512_sub_ps(_mm512_castsi512_ps(bits), middle);
  }
};

#ifdef __AVX512BF16__
struct Int4Pairs {
  static constexpr int kInputs = 8, kSteps = 4;
  static constexpr int kOrder[kInputs] = {0, 2, 4, 6, 1, 3, 5, 7};
  __m512i table;

  Int4Pairs() {
    uint16_t numbers[32];  // twice the same: of an index, the instruction looks at the lowest 5 bits
    for (int i = 0; i < 32; ++i) {
      const float number = float(i % 16 - 8);
      uint32_t bits;
      std::memcpy(&bits, &number, 4);
      numbers[i] = uint16_t(bits >> 16);
    }
    table = _mm512_loadu_si512(numbers);
  }

  template <int kStep>
  __m512 decode(__m512i codes) const {
    return _mm512_castsi512_ps(_mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 4 * kStep), table));
  }
};

struct Int8Pairs {
  static constexpr int kInputs = 4, kSteps = 2;
  static constexpr int kOrder[kInputs] = {0, 1, 2, 3};
  const Int8Floats single;

  template <int kStep>
  __m512 decode(__m512i codes) const {  // a code as float32 has nothing in its lower half
    const __m512i one = _mm512_castps_si512(single.template decode<2 * kStep>(codes));
    const __m512i two = _mm512_castps_si512(single.template decode<2 * kStep + 1>(codes));
    return _mm512_castsi512_ps(_mm512_or_si512(_mm512_srli_epi32(one, 16), two));
  }
};
#endif

template <bool kIsPairs>
inline __m512 add(__m512 sums, __m512 numbers, float word) {
#ifdef __AVX512BF16__
  if constexpr (kIsPairs) {
    int32_t bits;
    std::memcpy(&bits, &word, 4);
    return _mm512_dpbf16_ps(sums, (__m512bh)numbers, (__m512bh)_mm512_set1_epi32(bits));
  }
#endif
  return _mm512_fmadd_ps(numbers, _mm512_set1_ps(word), sums);
}

template <typename Kind>
struct Tiles {
  static constexpr bool kIsPairs = Kind::kSteps < Kind::kInputs;
  const Matrix& m;
  const Rows& rows;
  const Call& call;
  const int64_t words;  // of a row
  const Kind kind;

  template <int kRows, int kStep>
  void steps(__m512 (&sums)[kRows][2], __m512i left, __m512i right, const float* const* own, int64_t k) const {
    if constexpr (kStep < Kind::kSteps) {
      const __m512 one = kind.template decode<kStep>(left), two = kind.template decode<kStep>(right);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        sums[r][0] = add<kIsPairs>(sums[r][0], one, own[r][k + kStep]);
        sums[r][1] = add<kIsPairs>(sums[r][1], two, own[r][k + kStep]);
      }
      steps<kRows, kStep + 1>(sums, left, right, own, k);
    }
  }

  template <int kRows>
  void run(int64_t tile, int64_t first_row) const {
    const uint8_t* codes = m.codes + tile * kTile * m.padded() / Kind::kInputs * 4;
    const float* own[kRows];
    for (int r = 0; r < kRows; ++r) own[r] = rows.words + (first_row + r) * words;
    __m512 totals[kRows][2];
    for (auto& pair : totals) pair[0] = pair[1] = _mm512_setzero_ps();
    const int64_t group_words = m.group / Kind::kInputs * Kind::kSteps;
    for (int64_t g = 0; g < m.groups; ++g) {
      __m512 sums[kRows][2];
      for (auto& pair : sums) pair[0] = pair[1] = _mm512_setzero_ps();
      for (int64_t k = g * group_words; k < (g + 1) * group_words; k += Kind::kSteps, codes += 128) {
        ask_ahead(codes);
        const __m512i left = _mm512_loadu_si512(codes), right = _mm512_loadu_si512(codes + 64);
        steps<kRows, 0>(sums, left, right, own, k);
      }
      for (int half = 0; half < 2; ++half) fold<kRows>(totals, sums, half, tile, g, first_row);
    }
    for (int r = 0; r < kRows; ++r) finish(totals[r], m, call, first_row + r, tile);
  }

  // A group's sums to the totals: (sum of code * input - zero * sum of inputs) * scale.
  template <int kRows>
  void fold(__m512 (&totals)[kRows][2], const __m512 (&sums)[kRows][2], int half, int64_t tile, int64_t g,
            int64_t first_row) const {
    const int64_t place = (tile * m.groups + g) * kTile + half * 16;
    const __m512 scale = scales_at(m, place);
    if (!m.zeros) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) totals[r][half] = _mm512_fmadd_ps(sums[r][half], scale, totals[r][half]);
      return;
    }
    const __m512i middle = _mm512_set1_epi32(Kind::kInputs == 8 ? 8 : 128);
    const __m512 zero = _mm512_cvtepi32_ps(_mm512_sub_epi32(zeros_at(m, place), middle));
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const __m512 row_sum = _mm512_set1_ps(rows.sums[(first_row + r) * m.groups + g]);
      totals[r][half] = _mm512_fmadd_ps(_mm512_fnmadd_ps(zero, row_sum, sums[r][half]), scale, totals[r][half]);
    }
  }

  // A row's inputs in the order of the steps, and the sum of each of its groups.
  void lay_out(const void* row, int64_t number) const {
    static thread_local std::vector<float> memory;
    float* wide = scratch(memory, m.padded());
    widen(row, call.is_bf16, m, wide);
    if (m.zeros) {
      for (int64_t g = 0; g < m.groups; ++g) {
        float sum = 0.0f;
        for (int64_t k = 0; k < m.group; ++k) sum += wide[g * m.group + k];
        rows.sums[number * m.groups + g] = sum;
      }
    }
    float* own = rows.words + number * words;
    uint16_t* halves = reinterpret_cast<uint16_t*>(own);
    for (int64_t k = 0; k < m.padded(); k += Kind::kInputs) {
      for (int i = 0; i < Kind::kInputs; ++i) {
        const float value = wide[k + Kind::kOrder[i]];
        if constexpr (kIsPairs) {
          std::memcpy(halves + k + i, reinterpret_cast<const char*>(&value) + 2, 2);
        } else {
          own[k + i] = value;
        }
      }
    }
  }
};

template <typename Kind>
void share(const Matrix& m, const Call& call) {
  const Rows rows(m, call);
  const Tiles<Kind> tiles{m, rows, call, m.padded() / Kind::kInputs * Kind::kSteps, Kind()};
  const int64_t row_bytes = m.inputs * (call.is_bf16 ? 2 : 4);
#pragma omp for schedule(static)
  for (int64_t row = 0; row < call.rows; ++row) {
    tiles.lay_out(static_cast<const char*>(call.inputs) + row * row_bytes, row);
  }
  // Small shares until all is done: a thread whose core has other work delays nobody.
#pragma omp for schedule(dynamic, 2)
  for (int64_t tile = 0; tile < m.tiles(); ++tile) {
    by_rows(0, call.rows, [&](auto count, int64_t row) { tiles.template run<count()>(tile, row); });
  }
}

void share_any(const void* matrix, const Call* call) {
  const Matrix& m = *static_cast<const Matrix*>(matrix);
#ifdef __AVX512BF16__
  if (call->is_bf16) return (m.is_int4 ? share<Int4Pairs> : share<Int8Pairs>)(m, *call);
#endif
  (m.is_int4 ? share<Int4Floats> : share<Int8Floats>)(m, *call);
}

}  // namespace

// See ``Product`` in call.h.
extern "C" void mtnlg_float_product(const void* matrix, const Call* call, int64_t threads) {
  if (threads == 0) return share_any(matrix, call);
#pragma omp parallel num_threads(threads)
  share_any(matrix, call);
}
