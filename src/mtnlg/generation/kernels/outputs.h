// What comes right after a product, sixteen outputs at a time.

#pragma once

#include "numbers.h"

namespace {

constexpr int64_t kTile = 2 * kLanes;  // outputs whose weights lie together
constexpr int64_t kMostRows = 8;  // of one pass over a tile: 16 sums stay in registers
constexpr int64_t kAhead = 1536;  // bytes that are asked for before they are needed

struct Outputs {
  void* values;  // [rows][outputs]
  int64_t activation;
  const void* other;  // like values, or null
  bool is_sum;  // other is added, not multiplied
};

// Of a row of ``outputs``, those from ``first`` on; there may be fewer than sixteen, or none.
template <typename Number>
inline void finish(Floats found, const float* bias, const Outputs& out, int64_t outputs, int64_t row, int64_t first) {
  typedef typename Number::Value Value;
  const int64_t count = outputs - first, place = row * outputs + first;
  if (count <= 0) return;
  if (bias) found += load_some<Float32>(bias + first, count);
  if (out.activation != kNone) found = activated(found, out.activation);
  if (out.other) {
    const Floats other = load_some<Number>(static_cast<const Value*>(out.other) + place, count);
    found = out.is_sum ? found + other : found * other;
  }
  store_some<Number>(static_cast<Value*>(out.values) + place, found, count);
}

// A tile by all rows: ``run(constant number of rows, first row)``.
template <int kRows = kMostRows, typename Run>
inline void by_rows(int64_t row, int64_t left, const Run& run) {
  if constexpr (kRows > 1) {
    if (left < kRows) return by_rows<kRows - 1>(row, left, run);
  }
  run(std::integral_constant<int, kRows>(), row);
  if (left > kRows) by_rows<kRows>(row + kRows, left - kRows, run);
}

}  // namespace
