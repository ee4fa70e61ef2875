// The next token of each row: temperature, top-k, top-p, min-p, typical, one random number.
//
// No rule sorts the vocabulary. What a rule keeps is what is not below some score, and that score is found
// by halving: the part in which it cannot be is thrown away after one sum over it. draws.py has the same in
// numpy. A row is one thread's work, whatever the others are.

#include "scores.h"

namespace {

struct Rules {  // as draws.py fills it in; off: 0, 0, 1, -inf, 1. temperature 0 takes the most likely
  double temperature, top_k, top_p, log_min_p, typical_p, number;
};

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
  for (int64_t start = 0, block = 0; start < pool.size; start += kBlock, ++block)
    total += sums[block] = sum_up(start, std::min(start + kBlock, pool.size), [&](int64_t i) {
      return load_floats(pool.keys + i) >= floor ? load_floats(pool.weights + i) : Floats{};
    });
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
Pool keep(const float* x, int64_t size, float best, const Rules& rules, float& floor, Scratch& scratch,
          float guess) {
  Pool pool = temper(x, size, best, float(rules.temperature), scratch);
  floor = pool.low;
  if (rules.top_k > 0 && rules.top_k < double(size))
    floor = last_kept({pool.keys, nullptr, pool.size, pool.low, pool.high}, rules.top_k, scratch);
  if (rules.top_p < 1.0) {
    const double mass = rules.top_p * add_up(pool, floor, scratch.sums);
    floor = std::max(floor, last_kept(pool, mass, scratch, guess));
  }
  floor = std::max(floor, float(rules.log_min_p));
  if (rules.typical_p < 1.0) {
    pool = nearness_of(pool, floor, scratch);
    floor = last_kept(pool, rules.typical_p * add_up(pool, pool.low, scratch.sums), scratch);
  }
  return pool;
}

void choose(const float* x, int64_t size, const Rules& rules, float& best, int64_t& token, float* kept) {
  Scratch& scratch = Scratch::of_thread(size);
  best = largest(x, size, token, scratch);
  if (!std::isfinite(best) || rules.temperature == 0.0) return;
  int64_t count = size;
  const int32_t* ids = nullptr;
  if (rules.top_k > 0) {
    const float least = reached_by(size, std::min(int64_t(rules.top_k), size), scratch);
    if (least > kNothing) {
      count = candidates(x, size, least, scratch);
      x = scratch.values.data(), ids = scratch.ids.data();
    }
  }
  float floor, guess = ids ? kNothing : reached_by(size, kGuess, scratch);
  guess = (guess - best) / float(rules.temperature);
  const Pool pool = keep(x, count, best, rules, floor, scratch, guess);
  if (!kept) {
    const int64_t place = draw(pool, floor, rules.number, scratch);
    token = ids ? ids[place] : place;
    return;
  }
  const float scale = float(1.0 / add_up(pool, floor, scratch.sums));
  std::fill(kept, kept + size, 0.0f);
  for (int64_t i = 0; i < count; ++i)
    if (pool.keys[i] >= floor) kept[ids ? ids[i] : i] = pool.weights[i] * scale;
}

void likeliest(const float* x, int64_t size, int64_t count, double& total, float* values, int64_t* ids) {
  Scratch& scratch = Scratch::of_thread(size);
  int64_t place;
  const float best = largest(x, size, place, scratch);
  double weights = 0;
  for (int64_t start = 0; start < size; start += kBlock)
    weights += sum_up(start, std::min(start + kBlock, size), [&](int64_t i) {
      const Floats score = load_some(x + i, size - i, kNothing) - best;
      return score > -87.0f ? exponential(score) : Floats{};
    });
  total = double(best) + std::log(weights);
  if (!count || !std::isfinite(best)) return;
  const int64_t num = candidates(x, size, reached_by(size, count, scratch), scratch);
  std::vector<std::pair<float, int64_t>> found;
  for (int64_t i = 0; i < num; ++i) found.emplace_back(-scratch.values[i], scratch.ids[i]);
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
