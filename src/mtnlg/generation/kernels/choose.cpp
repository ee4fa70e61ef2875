// The next token of each row: temperature, top-k, top-p, min-p, typical, one random number.
//
// No rule sorts the vocabulary. What a rule keeps is what is not below some score, and that score is found
// by halving: the part in which it cannot be is thrown away after one sum over it. draws.py has the same in
// numpy. A row is one thread's work, whatever the others are.

#include <limits>

#include "numbers.h"

namespace {

constexpr int64_t kBlock = 256;  // scores that are added up in float32
constexpr int64_t kFew = 48;     // scores that are sorted
constexpr int64_t kSmall = 16384;  // scores that are not worth waking a thread for
const float kNothing = -INFINITY;

struct Rules {  // as draws.py fills it in; off: 0, 0, 1, -inf, 1. temperature 0 takes the most likely
  double temperature, top_k, top_p, log_min_p, typical_p, number;
};

// A thread's own, kept from step to step: fresh memory costs more than the work.
struct Scratch {
  std::vector<float> scores, weights, keys, parts, nearness;
  std::vector<double> sums;
  static Scratch& of_thread(int64_t size) {
    static thread_local Scratch found;
    const size_t needed = size_t(size + 2 * kLanes);
    if (found.scores.size() < needed) {
      for (auto* numbers : {&found.scores, &found.weights, &found.keys, &found.parts, &found.nearness})
        numbers->resize(needed);
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
  int32_t found = 0;
  for (int64_t i = 0; i < kLanes; ++i) found |= wanted[i];
  return found;
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

// The largest (not a number where there is one) and the first place of it.
float largest(const float* x, int64_t size, int64_t& place) {
  Floats best = Floats{} + kNothing;
  Integers bad = {};
  for (int64_t i = 0; i < size; i += kLanes) {
    const Floats values = load_some(x + i, size - i, kNothing);
    best = values > best ? values : best;
    bad |= values != values;
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

// Scores that a rule chooses among; weights may be null: each counts as one.
struct Pool {
  const float *keys, *weights;
  int64_t size;  // a multiple of sixteen
  float low, high;

  inline Floats weight(int64_t i) const { return weights ? load_floats(weights + i) : Floats{} + 1.0f; }

  double above(float pivot) const {
    double total = 0;
    for (int64_t start = 0; start < size; start += kBlock) {
      Floats sums = {};
      for (int64_t i = start; i < std::min(start + kBlock, size); i += kLanes)
        sums += load_floats(keys + i) > pivot ? weight(i) : Floats{};
      total += sum_of(sums);
    }
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

// The smallest key for which what is above it weighs less than `mass`.
float last_kept(Pool pool, double mass, Scratch& scratch) {
  double above = 0;  // what is above the whole pool
  while (pool.low < pool.high && pool.size > kFew) {
    float pivot = pool.low + (pool.high - pool.low) * 0.5f;
    if (!(pivot < pool.high)) pivot = pool.low;
    const double total = above + pool.above(pivot);
    if (total < mass) {
      above = total;
      pool.narrow(kNothing, pivot, scratch.keys.data(), scratch.parts.data());
    } else {
      pool.narrow(pivot, pool.high, scratch.keys.data(), scratch.parts.data());
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

// (x - best) / temperature and its exponential; how far the finite ones reach.
Pool temper(const float* x, int64_t size, float best, float temperature, Scratch& scratch) {
  float *scores = scratch.scores.data(), *weights = scratch.weights.data();
  Range range;
  for (int64_t i = 0; i < size; i += kLanes) {
    const Floats score = (load_some(x + i, size - i, kNothing) - best) / temperature;
    const Floats weight = exponential(score);
    store_floats(scores + i, score);
    store_floats(weights + i, score > -87.0f ? weight : Floats{});
    range.add(score, score > kNothing);
  }
  return {scores, weights, whole_vectors(size), range.lowest(), range.highest()};
}

// Minus the distance between each kept token's information and the entropy of what is kept.
Pool nearness_of(const Pool& pool, float floor, Scratch& scratch) {
  double total = 0, weighed = 0;
  for (int64_t start = 0; start < pool.size; start += kBlock) {
    Floats sums = {}, scores = {};
    for (int64_t i = start; i < std::min(start + kBlock, pool.size); i += kLanes) {
      const Floats key = load_floats(pool.keys + i);
      const Integers kept = (key >= floor) & (key > kNothing);
      const Floats weight = kept ? load_floats(pool.weights + i) : Floats{};
      sums += weight;
      scores += weight * (kept ? key : Floats{});
    }
    total += sum_of(sums), weighed += sum_of(scores);
  }
  const float information = float(weighed / total);  // the score whose information is the entropy
  float* nearness = scratch.nearness.data();
  Range range;
  for (int64_t i = 0; i < pool.size; i += kLanes) {
    const Floats key = load_floats(pool.keys + i), near = -size_of(key - information);
    const Integers kept = (key >= floor) & (key > kNothing);
    store_floats(nearness + i, kept ? near : Floats{} + kNothing);
    range.add(near, kept);
  }
  return {nearness, pool.weights, pool.size, range.lowest(), range.highest()};
}

// The sum of each block of what is kept; returns that of all.
double add_up(const Pool& pool, float floor, std::vector<double>& sums) {
  double total = 0;
  for (int64_t start = 0, block = 0; start < pool.size; start += kBlock, ++block) {
    Floats parts = {};
    for (int64_t i = start; i < std::min(start + kBlock, pool.size); i += kLanes)
      parts += load_floats(pool.keys + i) >= floor ? load_floats(pool.weights + i) : Floats{};
    total += sums[block] = sum_of(parts);
  }
  return total;
}

// The first token up to which what is kept weighs more than `share` of all of it.
int64_t draw(const Pool& pool, float floor, double share, Scratch& scratch) {
  double left = share * add_up(pool, floor, scratch.sums);
  const int64_t blocks = (pool.size + kBlock - 1) / kBlock;
  int64_t block = 0, last = -1;
  for (int64_t i = 0; i < blocks; ++i) {
    block = scratch.sums[i] > 0 ? i : block;  // the last with something in it, at most
    if (scratch.sums[i] > left) break;
    if (i + 1 < blocks) left -= scratch.sums[i];
  }
  for (int64_t i = block * kBlock; i < std::min((block + 1) * kBlock, pool.size); ++i) {
    if (!(pool.keys[i] >= floor) || pool.weights[i] == 0.0f) continue;
    last = i;  // a block's sum was rounded: it may not be reached
    left -= pool.weights[i];
    if (left < 0) break;
  }
  return last;
}

// What the rules keep is what is not below the returned key of the returned pool.
Pool keep(const float* x, int64_t size, float best, const Rules& rules, float& floor, Scratch& scratch) {
  Pool pool = temper(x, size, best, float(rules.temperature), scratch);
  floor = pool.low;
  if (rules.top_k > 0 && rules.top_k < double(size))
    floor = last_kept({pool.keys, nullptr, pool.size, pool.low, pool.high}, rules.top_k, scratch);
  if (rules.top_p < 1.0) {
    const double mass = rules.top_p * add_up(pool, floor, scratch.sums);
    floor = std::max(floor, last_kept(pool, mass, scratch));
  }
  floor = std::max(floor, float(rules.log_min_p));
  if (rules.typical_p < 1.0) {
    pool = nearness_of(pool, floor, scratch);
    floor = last_kept(pool, rules.typical_p * add_up(pool, pool.low, scratch.sums), scratch);
  }
  return pool;
}

void choose(const float* x, int64_t size, const Rules& rules, float& best, int64_t& token, float* kept) {
  best = largest(x, size, token);
  if (!std::isfinite(best) || rules.temperature == 0.0) return;
  Scratch& scratch = Scratch::of_thread(size);
  float floor;
  const Pool pool = keep(x, size, best, rules, floor, scratch);
  if (!kept) {
    token = draw(pool, floor, rules.number, scratch);
    return;
  }
  const float scale = float(1.0 / add_up(pool, floor, scratch.sums));
  for (int64_t i = 0; i < size; ++i) kept[i] = pool.keys[i] >= floor ? pool.weights[i] * scale : 0.0f;
}

void likeliest(const float* x, int64_t size, int64_t count, double& total, float* values, int64_t* ids) {
  Scratch& scratch = Scratch::of_thread(size);
  int64_t place;
  const float best = largest(x, size, place);
  const Pool pool = temper(x, size, best, 1.0f, scratch);
  total = double(best) + std::log(add_up(pool, kNothing, scratch.sums));
  if (!count || !std::isfinite(best)) return;
  const float floor = last_kept({pool.keys, nullptr, pool.size, pool.low, pool.high}, double(count), scratch);
  std::vector<std::pair<float, int64_t>> found;
  for (int64_t start = 0; start < pool.size; start += kBlock) {
    const int64_t end = std::min(start + kBlock, pool.size);
    Integers here = {};
    for (int64_t i = start; i < end; i += kLanes) here |= load_floats(pool.keys + i) >= floor;
    for (int64_t i = start; i < end && has_any(here); ++i)
      if (pool.keys[i] >= floor) found.emplace_back(-x[i], i);
  }
  for (int64_t i = 0; int64_t(found.size()) < count; ++i)  // those that cannot come, if need be
    if (pool.keys[i] == kNothing) found.emplace_back(-x[i], i);
  std::partial_sort(found.begin(), found.begin() + count, found.end());
  for (int64_t i = 0; i < count; ++i) values[i] = -found[i].first, ids[i] = found[i].second;
}

struct Seen {  // as penalties.py fills it in: which tokens a row has seen
  int64_t row, count;
  const int64_t* ids;
  const float* times;  // how often each was generated
};

struct Penalties {
  double repetition, frequency, presence;
};

void penalise(float* x, const Seen& seen, const Penalties& penalties) {
  const float repetition = float(penalties.repetition), presence = float(penalties.presence);
  for (int64_t i = 0; i < seen.count; ++i) {
    float& score = x[seen.ids[i]];
    float found = score < 0.0f ? score * repetition : score / repetition;
    found -= float(penalties.frequency * double(seen.times[i]));  // rounded before it is taken off
    found -= seen.times[i] > 0.0f ? presence : 0.0f;
    score = std::min(found, std::numeric_limits<float>::max());
  }
}

}  // namespace

// x: [rows][size]. best: the largest of each row, not a number where one of it is none. tokens: of the
// finite rows. kept: null, or [rows][size] for the probabilities of the rows that are not greedy.
extern "C" void mtnlg_choose(const float* x, int64_t rows, int64_t size, const double* rules, float* best,
                             int64_t* tokens, float* kept, int64_t threads) {
#pragma omp parallel for num_threads(std::min(threads, rows)) schedule(dynamic, 1) if (rows * size > kSmall)
  for (int64_t row = 0; row < rows; ++row)
    choose(x + row * size, size, reinterpret_cast<const Rules*>(rules)[row], best[row], tokens[row],
           kept ? kept + row * size : nullptr);
}

// The `count` largest of each row, largest first and of equal ones the first, and log(sum(exp(x))).
extern "C" void mtnlg_likeliest(const float* x, int64_t rows, int64_t size, int64_t count, double* totals,
                                float* values, int64_t* ids, int64_t threads) {
#pragma omp parallel for num_threads(std::min(threads, rows)) schedule(dynamic, 1) if (rows * size > kSmall)
  for (int64_t row = 0; row < rows; ++row)
    likeliest(x + row * size, size, count, totals[row], values + row * count, ids + row * count);
}

// Change the scores x [rows][size] of tokens that the `count` sequences have seen.
extern "C" void mtnlg_penalise(float* x, int64_t size, const void* seen, const void* penalties, int64_t count,
                               int64_t threads) {
  const Seen* of_rows = static_cast<const Seen*>(seen);
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) total += of_rows[i].count;
#pragma omp parallel for num_threads(std::min(threads, count)) schedule(dynamic, 1) if (total > kSmall)
  for (int64_t i = 0; i < count; ++i)
    penalise(x + of_rows[i].row * size, of_rows[i], static_cast<const Penalties*>(penalties)[i]);
}
