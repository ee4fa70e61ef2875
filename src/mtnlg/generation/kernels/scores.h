// Finding scores without sorting them: the largest, those that reach a number, the last that a rule keeps.

#pragma once

#include <functional>
#include <limits>

#include "numbers.h"

namespace {

constexpr int64_t kBlock = 1024;  // scores that are added up in float32, sixty-four lanes at a time
constexpr int64_t kGroup = 2048;  // scores of which each lane's largest is kept
constexpr int64_t kGuess = 64;    // so many tokens are often all that top-p keeps
constexpr int64_t kFew = 48;     // scores that are sorted
constexpr int64_t kSmall = 16384;  // scores that are not worth waking a thread for
const float kNothing = -INFINITY;

// A thread's own, kept from step to step: fresh memory costs more than the work.
struct Scratch {
  std::vector<float> scores, weights, keys, parts, nearness, values, largest, best;
  std::vector<int32_t> ids;
  std::vector<double> sums;
  static Scratch& of_thread(int64_t size) {
    static thread_local Scratch found;
    const size_t needed = size_t(size + 2 * kLanes);
    if (found.scores.size() < needed) {
      for (auto* numbers : {&found.scores, &found.weights, &found.keys, &found.parts, &found.nearness,
                            &found.values})
        numbers->resize(needed);
      found.ids.resize(needed);
      found.largest.resize((needed / kGroup + 1) * kLanes);
      found.sums.resize(needed / kBlock + 1);
    }
    return found;
  }
};

inline Floats load_some(const float* place, int64_t count, float otherwise) {
  if (count >= kLanes) return load_floats(place);
  Floats found = Floats{} + otherwise;
  for (int64_t i = 0; i < count; ++i) found[i] = place[i];
  return found;
}

inline void store_floats(float* place, Floats values) { std::memcpy(place, &values, sizeof(values)); }

inline int64_t whole_vectors(int64_t size) { return (size + kLanes - 1) / kLanes * kLanes; }

inline bool has_any(Integers wanted) {
#ifdef __AVX512F__
  return _mm512_test_epi32_mask((__m512i)wanted, (__m512i)wanted);
#else
  int32_t found = 0;
  for (int64_t i = 0; i < kLanes; ++i) found |= wanted[i];
  return found;
#endif
}

// The sum of of(i) for i = start, start + 16, ...
template <typename Of>
inline float sum_up(int64_t start, int64_t end, Of of) {
  Floats sums[4] = {};
  int64_t i = start;
  for (; i + 4 * kLanes <= end; i += 4 * kLanes)
    for (int64_t part = 0; part < 4; ++part) sums[part] += of(i + part * kLanes);
  for (; i < end; i += kLanes) sums[0] += of(i);
  return sum_of((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

struct Range {
  Floats low = Floats{} + INFINITY, high = Floats{} + kNothing;
  inline void add(Floats x, Integers wanted) {
    low = (wanted & (x < low)) ? x : low;
    high = (wanted & (x > high)) ? x : high;
  }
  float lowest() const {
    float found = low[0];
    for (int64_t i = 1; i < kLanes; ++i) found = std::min(found, low[i]);
    return found;
  }
  float highest() const {
    float found = high[0];
    for (int64_t i = 1; i < kLanes; ++i) found = std::max(found, high[i]);
    return found;
  }
};

inline Floats larger(Floats a, Floats b) { return b > a ? b : a; }

// The largest (not a number where there is one) and the first place of it. Of each group the largest of
// each lane goes to scratch.
float largest(const float* x, int64_t size, int64_t& place, Scratch& scratch) {
  Floats best = Floats{} + kNothing;
  Integers bad = {};
  for (int64_t start = 0; start < size; start += kGroup) {
    const Floats nothing = Floats{} + kNothing;
    Floats found[4] = {nothing, nothing, nothing, nothing};
    const int64_t end = std::min(start + kGroup, size);
    for (int64_t i = start; i < end; i += 4 * kLanes)
      for (int64_t part = 0, at = i; part < 4 && at < end; ++part, at += kLanes) {
        const Floats values = load_some(x + at, size - at, kNothing);
        found[part] = larger(found[part], values);
        bad |= values != values;
      }
    const Floats own = larger(larger(found[0], found[1]), larger(found[2], found[3]));
    store_floats(scratch.largest.data() + start / kGroup * kLanes, own);
    best = larger(best, own);
  }
  Range range;
  range.add(best, Integers{} - 1);
  const float found = range.highest();
  if (has_any(bad)) return NAN;
  place = 0;
  for (int64_t start = 0; start + kBlock <= size; start += kBlock) {
    Integers here = {};
    for (int64_t i = start; i < start + kBlock; i += kLanes) here |= load_floats(x + i) == found;
    place = start;
    if (has_any(here)) break;
    place += kBlock;
  }
  while (place + 1 < size && x[place] != found) ++place;
  return found;
}

// A number that at least so many scores reach: each lane's largest is another score.
float reached_by(int64_t size, int64_t count, Scratch& scratch) {
  const int64_t lanes = (size + kGroup - 1) / kGroup * kLanes;
  if (2 * count > lanes) return kNothing;
  scratch.best.assign(scratch.largest.begin(), scratch.largest.begin() + lanes);
  const auto place = scratch.best.begin() + count - 1;
  std::nth_element(scratch.best.begin(), place, scratch.best.end(), std::greater<float>());
  return *place;
}

// Those that reach `least`, in order, with their places; returns how many.
int64_t candidates(const float* x, int64_t size, float least, Scratch& scratch) {
  float* values = scratch.values.data();
  int32_t* ids = scratch.ids.data();
  int64_t count = 0;
  for (int64_t start = 0; start < size; start += kGroup) {
    if (!has_any(load_floats(scratch.largest.data() + start / kGroup * kLanes) >= least)) continue;
    for (int64_t i = start; i < std::min(start + kGroup, size); i += kLanes) {
      if (size - i >= kLanes && !has_any(load_floats(x + i) >= least)) continue;
      for (int64_t at = i; at < std::min(i + kLanes, size); ++at) {
        values[count] = x[at], ids[count] = int32_t(at);
        count += x[at] >= least;
      }
    }
  }
  return count;
}

// Scores that a rule chooses among; weights may be null: each counts as one.
struct Pool {
  const float *keys, *weights;
  int64_t size;  // a multiple of sixteen
  float low, high;

  inline Floats weight(int64_t i) const { return weights ? load_floats(weights + i) : Floats{} + 1.0f; }

  double above(float pivot) const {
    double total = 0;
    for (int64_t start = 0; start < size; start += kBlock)
      total += sum_up(start, std::min(start + kBlock, size),
                      [&](int64_t i) { return load_floats(keys + i) > pivot ? weight(i) : Floats{}; });
    return total;
  }

  // Only what is above `least` and not above `most`, in these arrays, which may be its own.
  void narrow(float least, float most, float* new_keys, float* new_weights) {
    int64_t count = 0;
    Range range;
    for (int64_t i = 0; i < size; i += kLanes) {
      const Floats key = load_floats(keys + i), part = weight(i);
      const Integers wanted = (key > least) & (key <= most);
      range.add(key, wanted);
#ifdef __AVX512F__
      const __mmask16 mask = _mm512_test_epi32_mask((__m512i)wanted, (__m512i)wanted);
      store_floats(new_keys + count, (Floats)_mm512_maskz_compress_ps(mask, (__m512)key));
      if (weights) store_floats(new_weights + count, (Floats)_mm512_maskz_compress_ps(mask, (__m512)part));
      count += __builtin_popcount(mask);
#else
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        new_keys[count] = key[lane];
        if (weights) new_weights[count] = part[lane];
        count -= wanted[lane];
      }
#endif
    }
    for (; count % kLanes; ++count) {
      new_keys[count] = kNothing;
      if (weights) new_weights[count] = 0.0f;
    }
    keys = new_keys, weights = weights ? new_weights : nullptr, size = count;
    low = range.lowest(), high = range.highest();
  }
};

// The smallest key for which what is above it weighs less than `mass`. Where it may be: the first guess.
float last_kept(Pool pool, double mass, Scratch& scratch, float guess = kNothing) {
  double above = 0;   // what is above the whole pool
  float reach = 8.0;  // one score far below the others shall not mislead
  if (guess > pool.low && guess < pool.high) {
    if (pool.above(guess) < mass)
      pool.high = guess;  // what is above it stays in the pool: too little to be thrown out
    else
      pool.narrow(guess, pool.high, scratch.keys.data(), scratch.parts.data());
  }
  for (; pool.low < pool.high && pool.size > kFew; reach *= 2) {
    float pivot = std::max(pool.low + (pool.high - pool.low) * 0.5f, pool.high - reach);
    if (!(pivot < pool.high)) pivot = pool.low;
    const double total = above + pool.above(pivot);
    if (total < mass) {
      above = total;
      pool.narrow(kNothing, pivot, scratch.keys.data(), scratch.parts.data());
    } else {
      pool.narrow(pivot, INFINITY, scratch.keys.data(), scratch.parts.data());
    }
  }
  if (!(pool.low < pool.high)) return pool.low;
  std::vector<std::pair<float, float>> few;
  for (int64_t i = 0; i < pool.size; ++i)
    if (pool.keys[i] > kNothing) few.emplace_back(pool.keys[i], pool.weights ? pool.weights[i] : 1.0f);
  std::sort(few.begin(), few.end(), [](const auto& a, const auto& b) { return a.first > b.first; });
  float kept = few[0].first;
  double likelier = above;
  for (const auto& [key, weight] : few) {
    if (key < kept) {
      if (likelier >= mass) break;
      kept = key;
    }
    above += weight;
    likelier = above;
  }
  return kept;
}

}  // namespace
