// Attention of tokens over keys and values in pages of 16 tokens, read where they lie.
//
// Keys of a page lie [head_dim][16 tokens]: a vector holds 16 keys, and sums over dimensions stay inside its
// lanes. Values lie [head_dim / block][16 tokens][block]. Everything is summed in float32, over a token's own
// keys in their order: its numbers depend neither on other tokens nor on the number of threads. Tokens that
// follow each other, and queries that share a head of keys, read a page together.

#pragma once

#include "numbers.h"

namespace {

constexpr int64_t kPage = 16;  // tokens
constexpr int kChains = 4;  // sums that do not wait for each other
constexpr int kTogether = 8;  // queries for which a key or value is loaded once
constexpr int64_t kSharesOfThread = 4;
constexpr int64_t kScores = 1 << 14;  // that a task should hold at most: they stay in the second cache

// What the caller says; sizes in elements.
struct Sizes {
  int64_t tokens, heads, queries, head_size, block, table, row, threads;
  int64_t queries_size() const { return queries * head_size; }
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

// Tokens of one row that follow each other.
struct Group {
  int64_t first, count, row;
};

// Where tokens stand and what they see.
struct Places {
  const int64_t *new_pages, *new_places;  // [tokens] where keys and values are filed; null: they are already
  const int64_t* pages;  // [rows][table]
  const int64_t* lengths;  // [tokens] keys that each sees
  const Group* groups;  // null: every token is a row
  int64_t num_groups;
};

// Scores of one page's 16 keys with some queries, [kCount][head_size]; to scores [kCount][row].
template <typename Number, int kCount>
inline void scores_of(const typename Number::Value* keys, const float* query, float* scores, int64_t row,
                      int64_t head_size, const typename Number::Value* next) {
  Floats sums[kCount][kChains] = {};
  int64_t d = 0;
  for (; d + kChains <= head_size; d += kChains) {
    ask_for<Number>(next + d * kPage);
    for (int c = 0; c < kChains; ++c) {
      const Floats key = Number::load(keys + (d + c) * kPage);
#pragma GCC unroll 8
      for (int q = 0; q < kCount; ++q) sums[q][c] += key * query[q * head_size + d + c];
    }
  }
  for (; d < head_size; ++d) {
    const Floats key = Number::load(keys + d * kPage);
    for (int q = 0; q < kCount; ++q) sums[q][0] += key * query[q * head_size + d];
  }
  for (int q = 0; q < kCount; ++q) {
    Float32::store(scores + q * row, (sums[q][0] + sums[q][1]) + (sums[q][2] + sums[q][3]));
  }
}

// sums [kCount][head_size] += weights [kCount][row] times the page's values, 16 dimensions at a time.
template <typename Number, int kCount>
inline void add_values(const typename Number::Value* values, const float* weights, int64_t row, float* sums,
                       const Sizes& s, const typename Number::Value* next) {
  const int64_t size = s.head_size;
  if (s.block == kPage) {
    for (int64_t d = 0; d < size; d += kPage, values += kPage * kPage, next += kPage * kPage) {
      Floats chains[kCount][kChains] = {};
      for (int q = 0; q < kCount; ++q) chains[q][0] = Float32::load(sums + q * size + d);
      for (int64_t t = 0; t < kPage; t += kChains) {
        ask_for<Number>(next + t * kPage);
        for (int c = 0; c < kChains; ++c) {
          const Floats value = Number::load(values + (t + c) * kPage);
#pragma GCC unroll 8
          for (int q = 0; q < kCount; ++q) chains[q][c] += value * weights[q * row + t + c];
        }
      }
      for (int q = 0; q < kCount; ++q) {
        Float32::store(sums + q * size + d, (chains[q][0] + chains[q][1]) + (chains[q][2] + chains[q][3]));
      }
    }
    return;
  }
  for (int64_t d = 0; d < size; d += s.block, values += kPage * s.block) {
    for (int q = 0; q < kCount; ++q) {
      for (int64_t t = 0; t < kPage; ++t) {
        const float weight = weights[q * row + t];
        for (int64_t j = 0; j < s.block; ++j) sums[q * size + d + j] += Number::get(values[t * s.block + j]) * weight;
      }
    }
  }
}

inline float highest_of(const float* scores, int64_t count) {
  Floats lanes = Float32::load(scores);
  for (int64_t k = kPage; k < count; k += kPage) {
    const Floats others = Float32::load(scores + k);
    lanes = others > lanes ? others : lanes;
  }
  float highest = lanes[0];
  for (int64_t lane = 1; lane < kPage; ++lane) highest = lanes[lane] > highest ? lanes[lane] : highest;
  return highest;
}

// Scores [row] become weights that are not yet divided by their total, zeros behind ``length``; returns that.
inline float weigh(float* scores, int64_t length, int64_t row) {
  const int64_t filled = (length + kPage - 1) / kPage * kPage;
  for (int64_t k = length; k < filled; ++k) scores[k] = -INFINITY;
  const float highest = highest_of(scores, filled);
  Floats total = {};
  for (int64_t k = 0; k < filled; k += kPage) {
    Floats weights = exponential(Float32::load(scores + k) - highest);
    if (k + kPage > length) {
      for (int64_t lane = length - k; lane < kPage; ++lane) weights[lane] = 0;
    }
    std::memcpy(scores + k, &weights, 64);
    total += weights;
  }
  std::fill(scores + filled, scores + row, 0.0f);
  return sum_of(total);
}

// Some heads of keys of a group, and all queries that look at them.
struct Task {
  Group group;
  const int64_t *pages, *lengths;  // of the row; of the group's tokens
  int64_t first, heads;
  int64_t num_pages() const { return (lengths[group.count - 1] + kPage - 1) / kPage; }
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

// use(first query, constant number of them) for ``count`` queries from ``begin`` on.
template <typename Use>
inline void by_some(int64_t begin, int64_t count, Use use) {
  int64_t q = begin;
  for (; q + kTogether <= begin + count; q += kTogether) use(q, std::integral_constant<int, kTogether>());
  for (; q < begin + count; ++q) use(q, std::integral_constant<int, 1>());
}

// use(token of the group, place in a head's queries of one token, number of the query in the task).
template <typename Use>
inline void for_each_query(const Sizes& s, const Task& task, Use use) {
  int64_t number = 0;
  for (int64_t h = 0; h < task.heads; ++h) {
    for (int64_t t = 0; t < task.group.count; ++t) {
      for (int64_t q = 0; q < s.queries; ++q) use(t, (task.first + h) * s.queries + q, number++);
    }
  }
}

// ``parts`` [tokens][row] and ``found`` [tokens][heads][queries][head_size] of all tokens. ``space`` holds floats.
template <typename Number>
void attend_heads(const Sizes& s, const Pools<Number>& pools, const typename Number::Value* parts,
                  typename Number::Value* found, const Task& task, std::vector<float>& space) {
  typedef const typename Number::Value* Values;
  const int64_t size = s.head_size, row = task.num_pages() * kPage;
  const int64_t of_head = task.group.count * s.queries, queries = task.heads * of_head;
  space.resize(queries * (2 * size + row + 1));
  float *scaled = space.data(), *sums = scaled + queries * size, *scores = sums + queries * size;
  float* totals = scores + queries * row;
  const float scale = 1.0f / std::sqrt(float(size));
  for_each_query(s, task, [&](int64_t t, int64_t place, int64_t q) {
    const auto* query = parts + (task.group.first + t) * s.row + place * size;
    for (int64_t d = 0; d < size; d += kLanes) {
      store_some<Float32>(scaled + q * size + d, load_some<Number>(query + d, size - d) * scale, size - d);
    }
  });
  std::fill(sums, sums + queries * size, 0.0f);
  for_each_head(s, task, Values(pools.keys), [&](int64_t p, int64_t h, Values keys, Values next) {
    by_some(h * of_head, of_head, [&](int64_t q, auto count) {
      scores_of<Number, count()>(keys, scaled + q * size, scores + q * row + p * kPage, row, size, next);
    });
  });
  for_each_query(s, task, [&](int64_t t, int64_t, int64_t q) {
    totals[q] = weigh(scores + q * row, task.lengths[t], row);
  });
  for_each_head(s, task, Values(pools.values), [&](int64_t p, int64_t h, Values values, Values next) {
    by_some(h * of_head, of_head, [&](int64_t q, auto count) {
      add_values<Number, count()>(values, scores + q * row + p * kPage, row, sums + q * size, s, next);
    });
  });
  for_each_query(s, task, [&](int64_t t, int64_t place, int64_t q) {
    auto* target = found + (task.group.first + t) * s.heads * s.queries_size() + place * size;
    for (int64_t d = 0; d < size; d += kLanes) {
      store_some<Number>(target + d, load_some<Float32>(sums + q * size + d, size - d) / totals[q], size - d);
    }
  });
}

// Heads of a task: whole tokens where there are many groups, else some heads of them each.
inline int64_t heads_of_task(const Sizes& s, int64_t num_groups) {
  const int64_t shares = std::min(s.heads, (kSharesOfThread * s.threads + num_groups - 1) / num_groups);
  return (s.heads + shares - 1) / shares;
}

// To be called by all threads of a parallel region; they leave together.
template <typename Number>
void share_attention(const Sizes& s, const void* parts, void* found, const Pools<Number>& pools, const Places& at) {
  const auto* rows = static_cast<const typename Number::Value*>(parts);
  auto* outputs = static_cast<typename Number::Value*>(found);
  if (at.new_pages) {  // all are filed before any is read: tokens may follow each other
#pragma omp for schedule(static)
    for (int64_t i = 0; i < s.tokens * s.heads; ++i) {
      const int64_t token = i / s.heads;
      file_token<Number>(s, pools, rows + token * s.row, i % s.heads, at.new_pages[token], at.new_places[token]);
    }
  }
  const int64_t heads = heads_of_task(s, at.num_groups), shares = (s.heads + heads - 1) / heads;
  std::vector<float> space;
  // Small shares until all is done, so that a thread whose core has other work delays nobody.
#pragma omp for schedule(dynamic, 1)
  for (int64_t i = 0; i < at.num_groups * shares; ++i) {
    const Group group = at.groups ? at.groups[i / shares] : Group{i / shares, 1, i / shares};
    Task task{group, at.pages + group.row * s.table, at.lengths + group.first, i % shares * heads, 0};
    const int64_t end = std::min(task.first + heads, s.heads);
    const int64_t fit = std::max<int64_t>(1, kScores / (task.num_pages() * kPage * group.count * s.queries));
    for (; task.first < end; task.first += task.heads) {
      task.heads = std::min(fit, end - task.first);
      attend_heads<Number>(s, pools, rows, outputs, task, space);
    }
  }
}

}  // namespace
