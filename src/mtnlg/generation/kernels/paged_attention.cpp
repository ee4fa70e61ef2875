// Attention of single tokens over keys and values in pages: see pages.h.

#include "pages.h"

// parts: [tokens][row], queries first and, where new_pages is not null, keys and values to file behind them.
// found: [tokens][heads][queries][head_size]. sizes: as in Sizes. flag 1: bf16.
extern "C" void mtnlg_attend(const void* parts, void* found, void* keys, void* values, const int64_t* new_pages,
                             const int64_t* new_places, const int64_t* pages, const int64_t* lengths,
                             const int64_t* sizes, int64_t flags) {
  Sizes s;
  std::memcpy(&s, sizes, sizeof(s));
  const Places at{new_pages, new_places, pages, lengths, nullptr, s.tokens};
  if (flags & 1) {
    const Pools<Bf16> pools{static_cast<uint16_t*>(keys), static_cast<uint16_t*>(values)};
#pragma omp parallel num_threads(s.threads)
    share_attention(s, parts, found, pools, at);
  } else {
    const Pools<Float32> pools{static_cast<float*>(keys), static_cast<float*>(values)};
#pragma omp parallel num_threads(s.threads)
    share_attention(s, parts, found, pools, at);
  }
}
