// One unit of the `attend` step of attention: its query rows, their online softmax, and loops over tiles of rows.
#ifndef EDGELM_KERNELS_ATTENTION_UNIT_IMPL_H_
#define EDGELM_KERNELS_ATTENTION_UNIT_IMPL_H_

#include "attention_cache_impl.h"

namespace edgelm {
namespace {

constexpr int64_t kBlockTiles = kKeyBlock / kCacheTile;
// Query rows that are processed with kVectors vectors of the cache at once: their sums take half of the registers.
constexpr int kQueryTile = kVectors == 2 ? 8 : 4;

template <int kN> struct Count { static constexpr int kValue = kN; };

// Call visit(Count<n>, r) for rows r .. r + n - 1, `kMost` at a time, then four, two, one.
template <int kMost, typename Visit>
inline EDGELM_FLAT void EachTile(int64_t rows, Visit visit) {
  int64_t r = 0;
  for (; r + kMost <= rows; r += kMost) visit(Count<kMost>(), r);
  if constexpr (kMost > 4) {
    for (; r + 4 <= rows; r += 4) visit(Count<4>(), r);
  }
  if constexpr (kMost > 2) {
    for (; r + 2 <= rows; r += 2) visit(Count<2>(), r);
  }
  if constexpr (kMost > 1) {
    for (; r < rows; ++r) visit(Count<1>(), r);
  }
}

// The query rows of a unit (tokens first .. first + tokens - 1, each with the heads of the group) and their state.
struct Unit {
  const Attention* call;
  AttentionLayout at;
  int64_t head, first, tokens, rows;
  int64_t query;        // index of row 0 in the scratch
  float* scores;        // [rows, kKeyBlock], then probabilities, then int8 caches' weights
  float* accumulators;  // [rows, width]
  float* tops;          // [rows] running maximum; then running sum; then the factor that rescales earlier sums
  float* sums;
  float* factors;
  float* weights;    // int8: running sum of weights
  int8_t* codes;     // int8: [rows of codes, kKeyBlock], at most two per row: second level, first level
  float* steps;      // of rows of codes
  int32_t* starts;   // of rows of codes: start value of their sums
  int32_t* targets;  // of rows of codes: the row that they belong to
  uint8_t* keys;     // packed
  uint8_t* values;

  // Number of tokens of the block at `begin` that row r sees.
  EDGELM_INLINE int64_t Seen(int64_t r, int64_t begin, int64_t count) const {
    const int64_t limit = call->past + first + r / call->group() + 1 - begin;
    return limit < count ? limit : count;
  }
};

inline Unit MakeUnit(const Attention& call, int64_t head, int64_t first, int64_t tokens, uint8_t* workspace) {
  const AttentionLayout at(call);
  float* state = reinterpret_cast<float*>(workspace + at.state);
  return {&call,
          at,
          head,
          first,
          tokens,
          tokens * call.group(),
          (head * call.rows + first) * call.group(),
          reinterpret_cast<float*>(workspace + at.scores),
          reinterpret_cast<float*>(workspace + at.accumulators),
          state,
          state + at.most,
          state + 2 * at.most,
          state + 3 * at.most,
          reinterpret_cast<int8_t*>(workspace + at.codes),
          state + 4 * at.most,
          reinterpret_cast<int32_t*>(state + 6 * at.most),
          reinterpret_cast<int32_t*>(state + 8 * at.most),
          workspace + at.keys,
          workspace + at.values};
}

// Turn a row's scores of a block into probabilities relative to its new maximum. With the values' `scales`, multiply by
// these too (weights). Returns the sum of the probabilities; *most is the largest result.
template <bool kScaled>
inline float Exponentials(float* s, int64_t valid, float top, const float* scales, float* most) {
  const F32 tops = Splat(top);
  F32 sum = Splat(0.0f), largest = Splat(0.0f);
  int64_t i = 0;
  for (; i + 16 <= valid; i += 16) {
    F32 p = Exp(Sub(Load(s + i), tops));
    sum = Add(sum, p);
    if (kScaled) {
      p = Mul(p, Load(scales + i));
      largest = Max(p, largest);
    }
    Store(s + i, p);
  }
  if (i < valid) {  // Exp never returns 0, so masked tokens are set to 0
    const int64_t left = valid - i;
    F32 p = Exp(Sub(LoadPart(s + i, left), tops));
    Store(s + i, Splat(0.0f));
    StorePart(s + i, p, left);
    p = Load(s + i);
    sum = Add(sum, p);
    if (kScaled) {
      p = Mul(p, LoadPart(scales + i, left));
      largest = Max(p, largest);
      Store(s + i, p);
    }
  }
  if (kScaled) *most = Largest(largest);
  return Sum(sum);
}

// Update the rows' running maxima with a block's scores. `factors` rescales the earlier sums.
inline void UpdateTops(const Unit& u, int64_t from, int64_t begin, int64_t count) {
  for (int64_t r = from; r < u.rows; ++r) {
    float* s = u.scores + r * kKeyBlock;
    const int64_t valid = u.Seen(r, begin, count), padded = RoundUp(valid, 16);
    for (int64_t i = valid; i < padded; ++i) s[i] = -INFINITY;
    F32 most = Splat(u.tops[r]);
    for (int64_t i = 0; i < padded; i += 16) most = Max(Load(s + i), most);  // ignores NaN
    u.factors[r] = Largest(most);
  }
  for (int64_t r = from; r < u.rows; r += 16) {
    const int64_t n = u.rows - r < 16 ? u.rows - r : 16;
    const F32 before = LoadPart(u.tops + r, n), after = LoadPart(u.factors + r, n);
    StorePart(u.tops + r, after, n);
    StorePart(u.factors + r, Exp(Sub(before, after)), n);
  }
}

// Rescale a row's sum and accumulators to its new maximum, and add a block's sum.
inline void UpdateSum(const Unit& u, int64_t r, float sum) {
  const float factor = u.factors[r];
  u.sums[r] = __builtin_fmaf(u.sums[r], factor, sum);
  if (factor == 1.0f) return;
  float* acc = u.accumulators + r * u.at.width;
  for (int64_t i = 0; i < u.at.width; i += 16) Store(acc + i, Mul(Load(acc + i), Splat(factor)));
}

// Vectors of the cache that a tile of rows is processed with at once.
constexpr int VectorsFor(int rows) { return rows <= 2 && kVectors == 2 ? 8 : kQueryTile * kVectors / rows; }

// The functions of a tile have two forms. kFew is for few query rows, where memory bandwidth is the limit. It reads the
// cache from front to back, since two streams a few kilobytes apart halve the bandwidth. While working on a block's
// keys it prefetches the block's values (`ahead`), and then the next block's keys, which the hardware prefetcher would
// not foresee.
template <bool kFew>
inline void CallFor(const uint8_t* p) {
  if (kFew) __builtin_prefetch(p, 0, 2);
}

}  // namespace
}  // namespace edgelm

#endif  // EDGELM_KERNELS_ATTENTION_UNIT_IMPL_H_
