// Scores of tokens that a mask does not allow become minus infinity, in one pass over packed bits.

#include <cmath>
#include <cstdint>

namespace {

constexpr int64_t kBits = 32;

void mask_row(float* scores, int64_t vocab, const uint32_t* words) {
  const int64_t whole = vocab / kBits;
  for (int64_t w = 0; w < whole; ++w) {
    float* some = scores + w * kBits;
    const uint32_t word = words[w];
    if (word == ~0u) continue;
    for (int64_t i = 0; i < kBits; ++i) some[i] = (word & (1u << i)) ? some[i] : -INFINITY;
  }
  for (int64_t i = whole * kBits; i < vocab; ++i)
    if (!(words[whole] >> (i - whole * kBits) & 1u)) scores[i] = -INFINITY;
}

}  // namespace

// scores: [.., vocab]; rows: which of them have a mask, num_rows of them; words: [num_rows, num_words].
extern "C" void mtnlg_mask(float* scores, int64_t vocab, const int64_t* rows, int64_t num_rows,
                           const uint32_t* words, int64_t num_words, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (num_rows > 1 && threads > 1)
  for (int64_t r = 0; r < num_rows; ++r) mask_row(scores + rows[r] * vocab, vocab, words + r * num_words);
}
