// A few rows by a matrix, float32 or bf16: outputs = rows * weights, summed in float32.
//
// Weights lie in tiles of 32 outputs, which are read once, from the first byte to the last, for all rows.
// In bf16 two inputs of an output lie side by side, as vdpbf16ps takes them. An output's sum runs over its
// inputs in their order: it does not depend on other rows nor on the number of threads.

#include <algorithm>
#include <cstdint>
#include <cstring>

#ifndef __AVX512F__
#error "needs AVX-512: other processors have too few registers for this"
#endif
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

typedef float Floats __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));

constexpr int64_t kTile = 32;  // outputs
constexpr int64_t kMostRows = 8;  // of one pass over a tile: 16 sums stay in registers
constexpr int64_t kAhead = 1536;  // bytes that are asked for before they are needed

struct Matrix {
  int64_t outputs, words;  // words of 4 bytes of one row: an input, or a pair of them in bf16
  const uint32_t* weights;  // [tiles][words][32]
  const float* bias;  // [outputs], or null
};

struct Outputs {
  void* values;  // [rows][outputs]
  const void* other;  // likewise, or null
  bool is_sum;
};

struct Float32 {
  static inline void add(Floats& sums, Words weights, uint32_t word) {
    float input;
    std::memcpy(&input, &word, 4);
    sums += (Floats)weights * input;
  }
  static float load(const void* values, int64_t place) { return static_cast<const float*>(values)[place]; }
  static void store(void* values, int64_t place, float value) { static_cast<float*>(values)[place] = value; }
};

struct Bf16 {
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
  static float load(const void* values, int64_t place) {
    const uint32_t bits = uint32_t(static_cast<const uint16_t*>(values)[place]) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  }
  static void store(void* values, int64_t place, float value) {  // to the nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const bool is_nan = value != value;
    bits = is_nan ? 0x7fc00000u : bits + 0x7fff + ((bits >> 16) & 1);
    static_cast<uint16_t*>(values)[place] = uint16_t(bits >> 16);
  }
};

template <typename Number>
void store(const Floats* sums, const Matrix& m, const Outputs& out, int64_t row, int64_t first) {
  const int64_t count = std::min(kTile, m.outputs - first), place = row * m.outputs + first;
  float values[kTile];
  std::memcpy(values, sums, sizeof(values));
  if (m.bias) {
    for (int64_t i = 0; i < count; ++i) values[i] += m.bias[first + i];
  }
  if (out.other && out.is_sum) {
    for (int64_t i = 0; i < count; ++i) values[i] += Number::load(out.other, place + i);
  } else if (out.other) {
    for (int64_t i = 0; i < count; ++i) values[i] *= Number::load(out.other, place + i);
  }
  for (int64_t i = 0; i < count; ++i) Number::store(out.values, place + i, values[i]);
}

template <typename Number, int kRows>
void tile_by_rows(const Matrix& m, const uint32_t* rows, const Outputs& out, int64_t tile, int64_t first_row) {
  const uint32_t* weights = m.weights + tile * kTile * m.words;
  const uint32_t* own[kRows];
  for (int r = 0; r < kRows; ++r) own[r] = rows + (first_row + r) * m.words;
  Floats sums[kRows][2];
  for (auto& both : sums) both[0] = both[1] = Floats{};
  for (int64_t k = 0; k < m.words; ++k, weights += kTile) {
    __builtin_prefetch(reinterpret_cast<const char*>(weights) + kAhead);
    __builtin_prefetch(reinterpret_cast<const char*>(weights) + kAhead + 64);
    Words left, right;
    std::memcpy(&left, weights, 64);
    std::memcpy(&right, weights + 16, 64);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const uint32_t word = own[r][k];
      Number::add(sums[r][0], left, word);
      Number::add(sums[r][1], right, word);
    }
  }
  for (int r = 0; r < kRows; ++r) store<Number>(sums[r], m, out, first_row + r, tile * kTile);
}

template <typename Number, int kRows>
void rows_of_tile(const Matrix& m, const uint32_t* rows, const Outputs& out, int64_t tile, int64_t row,
                  int64_t left) {
  if constexpr (kRows > 1) {
    if (left < kRows) return rows_of_tile<Number, kRows - 1>(m, rows, out, tile, row, left);
  }
  tile_by_rows<Number, kRows>(m, rows, out, tile, row);
  if (left > kRows) rows_of_tile<Number, kRows>(m, rows, out, tile, row + kRows, left - kRows);
}

template <typename Number>
void product(const Matrix& m, const uint32_t* rows, const Outputs& out, int64_t num_rows, int64_t threads) {
  const int64_t tiles = (m.outputs + kTile - 1) / kTile;
  // Small shares until all is done: a thread whose core has other work delays nobody.
#pragma omp parallel for num_threads(threads) schedule(dynamic, 2)
  for (int64_t tile = 0; tile < tiles; ++tile) {
    rows_of_tile<Number, kMostRows>(m, rows, out, tile, 0, num_rows);
  }
}

}  // namespace

// rows: [num_rows][words]; other: added (flag 2) or multiplied, or null; flag 1: bf16.
extern "C" void mtnlg_few_rows(const uint32_t* rows, void* values, const void* other, int64_t num_rows,
                               const uint32_t* weights, const float* bias, int64_t outputs, int64_t words,
                               int64_t flags, int64_t threads) {
  const Matrix m{outputs, words, weights, bias};
  const Outputs out{values, other, bool(flags & 2)};
  if (flags & 1) {
    product<Bf16>(m, rows, out, num_rows, threads);
  } else {
    product<Float32>(m, rows, out, num_rows, threads);
  }
}
