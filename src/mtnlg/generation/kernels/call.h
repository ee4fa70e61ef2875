// A product of rows by a matrix that another library knows how to read.

#pragma once

#include <cstdint>

namespace {

struct Call {
  const void* inputs;  // [rows][inputs]
  void* values;  // [rows][outputs]
  const void* other;  // like values, or null
  void* space;  // of the product's own, for each row as many bytes as quantized_linears.py says
  int64_t rows, activation, is_sum, is_bf16;
};

// With 0 threads it is called by all threads of a parallel region; they leave together.
typedef void (*Product)(const void* matrix, const Call* call, int64_t threads);

}  // namespace
