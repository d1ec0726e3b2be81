// Attention over a cache of keys and values, over the vectors of simd_*.h. Included after one of those.
//
// One step serves a block of kKeyBlock tokens: scores of all query rows of the unit, one update of their running
// maximum and sum, their weighted sum of values. Blocks are counted from the start of the cache and go in order, and a
// row takes no part in the arithmetic of another, so a row's result depends on neither its neighbours nor how work is
// cut.
//
// float32, float16: fused multiply-adds in float32, dimensions (scores) and tokens (sums) in order.
// fp8: a block's keys and values become float32, and then the same.
// int8: integer dot products of rounded queries and weights: attention_int8_impl.h.
#ifndef EDGELM_KERNELS_ATTENTION_IMPL_H_
#define EDGELM_KERNELS_ATTENTION_IMPL_H_

#include "attention_float_impl.h"
#include "attention_fp8_impl.h"
#include "attention_int8_impl.h"
#include "attention_prepare_impl.h"

namespace edgelm {
namespace {

// Rows of the unit over the cache's tokens [begin, end), from the start of their softmax.
inline void AttendTokens(const Unit& u, int64_t begin, int64_t end) {
  for (int64_t r = 0; r < u.rows; ++r) {
    u.tops[r] = -INFINITY;
    u.sums[r] = 0.0f;
    u.weights[r] = 0.0f;
  }
  std::memset(u.accumulators, 0, 4 * u.rows * u.at.width);
  for (int64_t block = begin; block < end; block += kKeyBlock) {
    const int64_t count = end - block < kKeyBlock ? end - block : kKeyBlock;
    // Rows of tokens before the block see nothing of it.
    const int64_t before = block - u.call->past - u.first, from = before > 0 ? before * u.call->group() : 0;
    switch (u.call->cache) {
      case CacheKind::kFloat32: AttendFloat<float>(u, from, block, count); break;
      case CacheKind::kFloat16: AttendFloat<uint16_t>(u, from, block, count); break;
      case CacheKind::kFp8: AttendFp8(u, from, block, count); break;
      case CacheKind::kInt8:
        u.call->split() ? AttendInt8<true>(u, from, block, count) : AttendInt8<false>(u, from, block, count);
        break;
    }
  }
}

// out = accumulators / sum
inline void FinishRow(const Attention& call, int64_t token, int64_t head, const float* acc, float sum) {
  float* out = call.out + (token * call.heads + head) * call.head_dim;
  for (int64_t i = 0; i < call.head_dim; i += 16) {
    const int64_t count = call.head_dim - i < 16 ? call.head_dim - i : 16;
    StorePart(out + i, Div(Load(acc + i), Splat(sum)), count);
  }
}

void AttentionAttend(const Attention& call, int64_t unit, uint8_t* workspace) {
  const int64_t pieces = call.pieces(), group = call.group();
  if (call.split()) {
    const int64_t head = unit / pieces, piece = unit % pieces, begin = piece * kCachePiece;
    const Unit u = MakeUnit(call, head, 0, call.rows, workspace);
    AttendTokens(u, begin, begin + kCachePiece < call.total() ? begin + kCachePiece : call.total());
    for (int64_t r = 0; r < u.rows; ++r) {
      const float* acc = u.accumulators + r * u.at.width;
      if (pieces == 1) {
        FinishRow(call, r / group, head * group + r % group, acc, u.sums[r]);
        continue;
      }
      const int64_t at = (u.query + r) * pieces + piece;
      reinterpret_cast<float*>(call.scratch + u.at.tops)[at] = u.tops[r];
      reinterpret_cast<float*>(call.scratch + u.at.sums)[at] = u.sums[r];
      std::memcpy(reinterpret_cast<float*>(call.scratch + u.at.partials) + at * u.at.width, acc, 4 * u.at.width);
    }
    return;
  }
  // The last blocks, which see most, first: whoever gets the last unit gets a short one.
  const int64_t head = unit % call.kv_heads, first = (call.blocks() - 1 - unit / call.kv_heads) * call.block_rows();
  const int64_t tokens = call.rows - first < call.block_rows() ? call.rows - first : call.block_rows();
  const Unit u = MakeUnit(call, head, first, tokens, workspace);
  AttendTokens(u, 0, call.past + first + tokens);
  for (int64_t r = 0; r < u.rows; ++r)
    FinishRow(call, first + r / group, head * group + r % group, u.accumulators + r * u.at.width, u.sums[r]);
}

void AttentionCombine(const Attention& call, int64_t unit) {
  const AttentionLayout at(call);
  const int64_t head = unit / call.rows, token = unit % call.rows, group = call.group(), all = call.pieces();
  // Pieces that begin after the token know nothing of it.
  const int64_t pieces = (call.past + token) / kCachePiece + 1;
  for (int64_t g = 0; g < group; ++g) {
    const int64_t row = unit * group + g;
    const float* tops = reinterpret_cast<const float*>(call.scratch + at.tops) + row * all;
    const float* sums = reinterpret_cast<const float*>(call.scratch + at.sums) + row * all;
    float* partials = reinterpret_cast<float*>(call.scratch + at.partials) + row * all * at.width;
    float top = tops[0], sum = 0.0f;
    for (int64_t i = 1; i < pieces; ++i) top = tops[i] > top ? tops[i] : top;
    for (int64_t i = 0; i < pieces; ++i) {
      float factor[16];
      Store(factor, Exp(Splat(tops[i] - top)));
      sum = __builtin_fmaf(sums[i], factor[0], sum);
      for (int64_t d = 0; d < at.width; d += 16) {  // into the first piece's
        const F32 before = i == 0 ? Splat(0.0f) : Load(partials + d);
        Store(partials + d, Fma(Load(partials + i * at.width + d), Splat(factor[0]), before));
      }
    }
    FinishRow(call, token, head * group + g, partials, sum);
  }
}

}  // namespace
}  // namespace edgelm

#endif  // EDGELM_KERNELS_ATTENTION_IMPL_H_
