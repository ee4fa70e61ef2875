// A whole step of a decoder: a list of operations, which all threads go through together.
//
// Threads are asked once for a step instead of once for each of a hundred operations, and between two of
// them they wait for each other without going to sleep.

#ifndef __AVX512F__
#error "needs AVX-512: see tiled_product.cpp"
#endif

#include "call.h"
#include "matrix.h"
#include "pages.h"

namespace {

enum Kind : int64_t { kNorm, kHeadNorm, kProduct, kCall, kTurn, kAttend };

constexpr int64_t kOfRms = 1, kWanted = 2;  // flags of norms

// As native_step.py fills it in. A token's numbers lie without gaps.
struct Operation {
  int64_t kind, activation, flags;
  const void* source;
  void* target;  // null: the step's logits
  const void *first, *second, *other;
  int64_t sizes[4];
  double epsilon;
};

struct Step {
  int64_t tokens, threads, table;  // pages of the longest row
  void* logits;  // [wanted][vocabulary]
  Places at;
  const void *cosine, *sine;  // [tokens][rotary_dim], or null
  const int64_t* wanted;  // tokens whose logits are
  int64_t num_wanted;
  void* space;  // of products elsewhere
};

// (x - mean) / deviation * weight + bias, or x / root mean square * weight. sizes: of a row.
template <typename Number>
void norm(const Operation& o, const void* source, int64_t from, int64_t to) {
  typedef typename Number::Value Value;
  const int64_t size = o.sizes[0];
  const Value* x = static_cast<const Value*>(source) + from;
  Value* y = static_cast<Value*>(o.target) + to;
  const auto *weight = static_cast<const Value*>(o.first), *bias = static_cast<const Value*>(o.second);
  float mean = 0;
  if (!(o.flags & kOfRms)) {
    Floats sums = {};
    for (int64_t i = 0; i < size; i += kLanes) sums += Number::load(x + i);
    mean = sum_of(sums) / float(size);
  }
  Floats squares = {};
  for (int64_t i = 0; i < size; i += kLanes) {
    const Floats off = Number::load(x + i) - mean;
    squares += off * off;
  }
  const float scale = 1.0f / std::sqrt(sum_of(squares) / float(size) + float(o.epsilon));
  for (int64_t i = 0; i < size; i += kLanes) {
    Floats found = (Number::load(x + i) - mean) * scale * Number::load(weight + i);
    if (bias) found += Number::load(bias + i);
    Number::store(y + i, found);
  }
}

// Of each of some heads, in place. sizes: head_dim, of a row, where the first begins, heads.
template <typename Number>
void norm_heads(const Operation& o, int64_t row) {
  const int64_t begin = row * o.sizes[1] + o.sizes[2];
  for (int64_t h = 0; h < o.sizes[3]; ++h) norm<Number>(o, o.target, begin + h * o.sizes[0], begin + h * o.sizes[0]);
}

// Rotary positions of queries and keys, in place. sizes: a row, heads to turn, head_dim, rotary_dim.
template <typename Number>
void turn_row(const Operation& o, const Step& step, int64_t row) {
  typedef typename Number::Value Value;
  const int64_t heads = o.sizes[1], head_size = o.sizes[2], turned = o.sizes[3], half = turned / 2;
  Value* head = static_cast<Value*>(o.target) + row * o.sizes[0];
  const Value* cosine = static_cast<const Value*>(step.cosine) + row * turned;
  const Value* sine = static_cast<const Value*>(step.sine) + row * turned;
  for (int64_t h = 0; h < heads; ++h, head += head_size) {
    for (int64_t i = 0; i < half; i += kLanes) {
      const auto read = [&](const Value* place) { return load_some<Number>(place + i, half - i); };
      const Floats a = read(head), b = read(head + half);
      store_some<Number>(head + i, a * read(cosine) - b * read(sine), half - i);
      store_some<Number>(head + half + i, b * read(cosine + half) + a * read(sine + half), half - i);
    }
  }
}

// sizes: outputs, words. flags: other is added.
template <typename Number>
void multiply(const Operation& o, const Step& step) {
  const Matrix m{o.sizes[0], o.sizes[1], static_cast<const uint32_t*>(o.first), static_cast<const float*>(o.second)};
  const Outputs out{o.target ? o.target : step.logits, o.activation, o.other, bool(o.flags)};
  share_product<Number>(m, static_cast<const uint32_t*>(o.source), out, o.target ? step.tokens : step.num_wanted);
}

// Of a matrix that another library reads: first. second: its function. flags: other is added.
template <typename Number>
void call(const Operation& o, const Step& step) {
  const int64_t rows = o.target ? step.tokens : step.num_wanted, is_bf16 = std::is_same_v<Number, Bf16>;
  const Call all{o.source, o.target ? o.target : step.logits, o.other, step.space, rows, o.activation, o.flags, is_bf16};
  reinterpret_cast<Product>(const_cast<void*>(o.second))(o.first, &all, 0);
}

// sizes: heads, queries, head_dim, block. first, second: pools of keys and values.
template <typename Number>
void look_back(const Operation& o, const Step& step) {
  typedef typename Number::Value Value;
  const int64_t heads = o.sizes[0], queries = o.sizes[1], size = o.sizes[2];
  const Sizes s{step.tokens, heads, queries, size, o.sizes[3], step.table, heads * (queries + 2) * size, step.threads};
  const Pools<Number> pools{static_cast<Value*>(const_cast<void*>(o.first)),
                            static_cast<Value*>(const_cast<void*>(o.second))};
  share_attention(s, o.source, o.target, pools, step.at);
}

template <typename Number>
void run(const Operation* operations, int64_t count, const Step& step) {
#pragma omp parallel num_threads(step.threads)
  for (int64_t index = 0; index < count; ++index) {
    const Operation& o = operations[index];
    switch (o.kind) {
      case kProduct: multiply<Number>(o, step); break;
      case kCall: call<Number>(o, step); break;
      case kAttend: look_back<Number>(o, step); break;
      case kNorm: {
        const bool is_last = o.flags & kWanted;
        const int64_t count = is_last ? step.num_wanted : step.tokens;
#pragma omp for schedule(static)
        for (int64_t row = 0; row < count; ++row) {
          norm<Number>(o, o.source, (is_last ? step.wanted[row] : row) * o.sizes[0], row * o.sizes[0]);
        }
        break;
      }
      case kHeadNorm:
#pragma omp for schedule(static)
        for (int64_t row = 0; row < step.tokens; ++row) norm_heads<Number>(o, row);
        break;
      case kTurn:
#pragma omp for schedule(static)
        for (int64_t row = 0; row < step.tokens; ++row) turn_row<Number>(o, step, row);
    }
  }
}

}  // namespace

// operations: [count]; flag 1: bf16.
extern "C" void mtnlg_step(const void* operations, int64_t count, const void* step, int64_t flags) {
  const auto* list = static_cast<const Operation*>(operations);
  if (flags & 1) {
    run<Bf16>(list, count, *static_cast<const Step*>(step));
  } else {
    run<Float32>(list, count, *static_cast<const Step*>(step));
  }
}
