// Rows by a matrix, summed in float32.
//
// Weights lie in tiles of 32 outputs, which are read once, from the first byte to the last: the second cache
// keeps a tile while all rows go over it, some at a time.
// In bf16 two inputs of an output lie side by side, as vdpbf16ps takes them. An output's sum runs over its
// inputs in their order: it does not depend on other rows nor on the number of threads.

#pragma once

#include "numbers.h"

namespace {

constexpr int64_t kTile = 2 * kLanes;  // outputs
constexpr int64_t kMostRows = 8;  // of one pass over a tile: 16 sums stay in registers
constexpr int64_t kAhead = 1536;  // bytes that are asked for before they are needed

struct Matrix {
  int64_t outputs, words;  // words of 4 bytes of one row: an input, or a pair of them in bf16
  const uint32_t* weights;  // [tiles][words][32]
  const float* bias;  // [outputs], or null
  int64_t tiles() const { return (outputs + kTile - 1) / kTile; }
};

struct Outputs {
  void* values;  // [rows][outputs]
  int64_t activation;
  const void* other;  // like values, or null
  bool is_sum;  // other is added, not multiplied
};

template <typename Number>
inline void store(const Floats* sums, const Matrix& m, const Outputs& out, int64_t row, int64_t first) {
  typedef typename Number::Value Value;
  for (int64_t half = 0; half < 2 && first < m.outputs; ++half, first += kLanes) {
    const int64_t count = m.outputs - first, place = row * m.outputs + first;
    Floats found = sums[half];
    if (m.bias) found += load_some<Float32>(m.bias + first, count);
    if (out.activation != kNone) found = activated(found, out.activation);
    if (out.other) {
      const Floats other = load_some<Number>(static_cast<const Value*>(out.other) + place, count);
      found = out.is_sum ? found + other : found * other;
    }
    store_some<Number>(static_cast<Value*>(out.values) + place, found, count);
  }
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
    std::memcpy(&right, weights + kLanes, 64);
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

// To be called by all threads of a parallel region; they leave together.
template <typename Number>
void share_product(const Matrix& m, const uint32_t* rows, const Outputs& out, int64_t num_rows) {
  // Small shares until all is done: a thread whose core has other work delays nobody.
#pragma omp for schedule(dynamic, 2)
  for (int64_t tile = 0; tile < m.tiles(); ++tile) {
    rows_of_tile<Number, kMostRows>(m, rows, out, tile, 0, num_rows);
  }
}

}  // namespace
