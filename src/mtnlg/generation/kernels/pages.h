// Attention of single tokens over keys and values in pages of 16 tokens, read where they lie.
//
// Keys of a page lie [head_dim][16 tokens]: a vector holds 16 keys, and sums over dimensions stay inside its
// lanes. Values lie [head_dim / block][16 tokens][block]. Everything is summed in float32, over a token's own
// keys in their order: its numbers depend neither on other tokens nor on the number of threads.

#pragma once

#include "numbers.h"

namespace {

constexpr int64_t kPage = 16;  // tokens
constexpr int kChains = 4;  // sums that do not wait for each other
constexpr int64_t kSharesOfThread = 4;

// What the caller says; sizes in elements.
struct Sizes {
  int64_t tokens, heads, queries, head_size, block, table, row, threads;
  int64_t page() const { return heads * head_size * kPage; }
};

template <typename Number>
struct Pools {
  typename Number::Value *keys, *values;
};

template <typename Number>
void file_token(const Sizes& s, const Pools<Number>& pools, const typename Number::Value* parts, int64_t head,
                int64_t page, int64_t place) {
  const auto* key = parts + (s.heads * s.queries + head) * s.head_size;
  const auto* value = key + s.heads * s.head_size;
  const int64_t begin = page * s.page() + head * s.head_size * kPage;
  for (int64_t d = 0; d < s.head_size; ++d) pools.keys[begin + d * kPage + place] = key[d];
  for (int64_t d = 0; d < s.head_size; d += s.block) {
    std::memcpy(pools.values + begin + d * kPage + place * s.block, value + d, s.block * sizeof(*value));
  }
}

// Asks for 4 rows of 16 numbers of what is read next.
template <typename Number>
inline void ask_for(const typename Number::Value* next) {
  for (int64_t byte = 0; byte < 4 * kPage * int64_t(sizeof(*next)); byte += 64) {
    __builtin_prefetch(reinterpret_cast<const char*>(next) + byte);
  }
}

// Scores of one page's 16 keys with one query.
template <typename Number>
inline Floats scores_of(const typename Number::Value* keys, const float* query, int64_t head_size,
                        const typename Number::Value* next) {
  Floats sums[kChains] = {};
  int64_t d = 0;
  for (; d + kChains <= head_size; d += kChains) {
    ask_for<Number>(next + d * kPage);
    for (int c = 0; c < kChains; ++c) sums[c] += Number::load(keys + (d + c) * kPage) * query[d + c];
  }
  for (; d < head_size; ++d) sums[0] += Number::load(keys + d * kPage) * query[d];
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// sums [head_size] += weights [16] times the page's values, 16 dimensions at a time.
template <typename Number>
inline void add_values(const typename Number::Value* values, const float* weights, float* sums, const Sizes& s,
                       const typename Number::Value* next) {
  if (s.block == kPage) {
    for (int64_t d = 0; d < s.head_size; d += kPage, values += kPage * kPage, next += kPage * kPage) {
      Floats chains[kChains] = {Float32::load(sums + d)};
      for (int64_t t = 0; t < kPage; t += kChains) {
        ask_for<Number>(next + t * kPage);
        for (int c = 0; c < kChains; ++c) {
          chains[c] += Number::load(values + (t + c) * kPage) * weights[t + c];
        }
      }
      const Floats total = (chains[0] + chains[1]) + (chains[2] + chains[3]);
      std::memcpy(sums + d, &total, 64);
    }
    return;
  }
  for (int64_t d = 0; d < s.head_size; d += s.block, values += kPage * s.block) {
    for (int64_t t = 0; t < kPage; ++t) {
      for (int64_t j = 0; j < s.block; ++j) sums[d + j] += Number::get(values[t * s.block + j]) * weights[t];
    }
  }
}

// Scores become weights that are not yet divided by their total; returns that.
inline float weigh(float* scores, int64_t length) {
  const int64_t filled = (length + kPage - 1) / kPage * kPage;
  for (int64_t k = length; k < filled; ++k) scores[k] = -INFINITY;
  float highest = scores[0];
  for (int64_t k = 1; k < length; ++k) highest = scores[k] > highest ? scores[k] : highest;
  Floats total = {};
  for (int64_t k = 0; k < filled; k += kPage) {
    Floats weights = exponential(Float32::load(scores + k) - highest);
    if (k + kPage > length) {
      for (int64_t lane = length - k; lane < kPage; ++lane) weights[lane] = 0;
    }
    std::memcpy(scores + k, &weights, 64);
    total += weights;
  }
  return sum_of(total);
}

// Some heads of keys of one token, and all queries that look at them.
struct Task {
  const int64_t* pages;
  int64_t length, first, heads;
  int64_t num_pages() const { return (length + kPage - 1) / kPage; }
};

// use(page, head, its keys or values, what is read next), in the order in which they lie in memory: heads of a
// page lie beside each other, and memory gives twice as much for whole pages as for single heads of them.
template <typename Value, typename Use>
inline void for_each_head(const Sizes& s, const Task& task, const Value* pool, Use use) {
  const int64_t size = s.head_size * kPage, last = task.num_pages() - 1;
  for (int64_t p = 0; p <= last; ++p) {
    const Value* here = pool + task.pages[p] * s.page() + task.first * size;
    const Value* next_page = pool + task.pages[std::min(p + 1, last)] * s.page() + task.first * size;
    for (int64_t h = 0; h < task.heads; ++h, here += size) {
      use(p, h, here, h + 1 < task.heads ? here + size : next_page);
    }
  }
}

// ``query`` and ``found`` are those of the task's first head. ``space`` holds floats.
template <typename Number>
void attend_heads(const Sizes& s, const Pools<Number>& pools, const typename Number::Value* query,
                  typename Number::Value* found, const Task& task, std::vector<float>& space) {
  typedef const typename Number::Value* Values;
  const int64_t queries = task.heads * s.queries, numbers = queries * s.head_size, row = task.num_pages() * kPage;
  space.resize(2 * numbers + queries * (row + 1));
  float *scaled = space.data(), *sums = scaled + numbers, *scores = sums + numbers, *totals = scores + queries * row;
  const float scale = 1.0f / std::sqrt(float(s.head_size));
  for (int64_t i = 0; i < numbers; ++i) scaled[i] = Number::get(query[i]) * scale, sums[i] = 0;
  for_each_head(s, task, Values(pools.keys), [&](int64_t p, int64_t h, Values keys, Values next) {
    for (int64_t q = h * s.queries; q < (h + 1) * s.queries; ++q) {
      const Floats of_page = scores_of<Number>(keys, scaled + q * s.head_size, s.head_size, next);
      std::memcpy(scores + q * row + p * kPage, &of_page, 64);
    }
  });
  for (int64_t q = 0; q < queries; ++q) totals[q] = weigh(scores + q * row, task.length);
  for_each_head(s, task, Values(pools.values), [&](int64_t p, int64_t h, Values values, Values next) {
    for (int64_t q = h * s.queries; q < (h + 1) * s.queries; ++q) {
      add_values<Number>(values, scores + q * row + p * kPage, sums + q * s.head_size, s, next);
    }
  });
  for (int64_t i = 0; i < numbers; ++i) found[i] = Number::put(sums[i] / totals[i / s.head_size]);
}

// To be called by all threads of a parallel region; they leave together.
template <typename Number>
void share_attention(const Sizes& s, const void* parts, void* found, const Pools<Number>& pools,
                     const int64_t* new_pages, const int64_t* new_places, const int64_t* pages,
                     const int64_t* lengths) {
  const auto* rows = static_cast<const typename Number::Value*>(parts);
  auto* outputs = static_cast<typename Number::Value*>(found);
  const int64_t own = s.queries * s.head_size, count = s.tokens * s.heads;
  // Whole tokens where there are many, else some heads of them each: small shares until all is done, so that a
  // thread whose core has other work delays nobody.
  const int64_t wanted = std::min(s.heads, (kSharesOfThread * s.threads + s.tokens - 1) / s.tokens);
  const int64_t heads = (s.heads + wanted - 1) / wanted, shares = (s.heads + heads - 1) / heads;
  if (new_pages) {  // all are filed before any is read: tokens may follow each other
#pragma omp for schedule(static)
    for (int64_t i = 0; i < count; ++i) {
      const int64_t token = i / s.heads;
      file_token<Number>(s, pools, rows + token * s.row, i % s.heads, new_pages[token], new_places[token]);
    }
  }
  std::vector<float> space;
#pragma omp for schedule(dynamic, 1)
  for (int64_t i = 0; i < s.tokens * shares; ++i) {
    const int64_t token = i / shares, first = i % shares * heads;
    const Task task{pages + token * s.table, lengths[token], first, std::min(heads, s.heads - first)};
    attend_heads<Number>(s, pools, rows + token * s.row + first * own,
                         outputs + (token * s.heads + first) * own, task, space);
  }
}

}  // namespace
