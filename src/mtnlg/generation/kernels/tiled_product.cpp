// Rows by a matrix, float32 or bf16: see matrix.h.
//
// Its vectors are written out: the compiler, which looks for none, takes two thirds of the time.
// flag: -fno-tree-vectorize

#ifndef __AVX512F__
#error "needs AVX-512: other processors have too few registers for this"
#endif

#include "matrix.h"

namespace {

template <typename Number>
void product(const Matrix& m, const uint32_t* rows, const Outputs& out, int64_t num_rows, int64_t threads) {
#pragma omp parallel num_threads(threads)
  share_product<Number>(m, rows, out, num_rows);
}

}  // namespace

// rows: [num_rows][words]; other: added (flag 2) or multiplied, or null; flag 1: bf16.
extern "C" void mtnlg_tiled_product(const uint32_t* rows, void* values, const void* other, int64_t num_rows,
                               const uint32_t* weights, const float* bias, int64_t outputs, int64_t words,
                               int64_t flags, int64_t activation, int64_t threads) {
  const Matrix m{outputs, words, weights, bias};
  const Outputs out{values, activation, other, bool(flags & 2)};
  if (flags & 1) {
    product<Bf16>(m, rows, out, num_rows, threads);
  } else {
    product<Float32>(m, rows, out, num_rows, threads);
  }
}
