// Rows by a matrix, summed in float32.
//
// Weights lie in tiles of 32 outputs, which are read once, from the first byte to the last: the second cache
// keeps a tile while all rows go over it, some at a time.
// In bf16 two inputs of an output lie side by side, as vdpbf16ps takes them. An output's sum runs over its
// inputs in their order: it does not depend on other rows nor on the number of threads.

#pragma once

#include "outputs.h"

namespace {

struct Matrix {
  int64_t outputs, words;  // words of 4 bytes of one row: an input, or a pair of them in bf16
  const uint32_t* weights;  // [tiles][words][32]
  const float* bias;  // [outputs], or null
  int64_t tiles() const { return (outputs + kTile - 1) / kTile; }
};

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
  for (int r = 0; r < kRows; ++r) {
    finish<Number>(sums[r][0], m.bias, out, m.outputs, first_row + r, tile * kTile);
    finish<Number>(sums[r][1], m.bias, out, m.outputs, first_row + r, tile * kTile + kLanes);
  }
}

// To be called by all threads of a parallel region; they leave together.
template <typename Number>
void share_product(const Matrix& m, const uint32_t* rows, const Outputs& out, int64_t num_rows) {
  // Small shares until all is done: a thread whose core has other work delays nobody.
#pragma omp for schedule(dynamic, 2)
  for (int64_t tile = 0; tile < m.tiles(); ++tile) {
    by_rows(0, num_rows, [&](auto count, int64_t row) { tile_by_rows<Number, count()>(m, rows, out, tile, row); });
  }
}

}  // namespace
