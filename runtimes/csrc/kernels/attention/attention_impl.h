// The `attend` and `combine` steps of attention over a KV cache. Included after one of simd_*.h.
//
// One step handles a block of kKeyBlock tokens: scores of all query rows of the unit, one update of their running
// maximum and sum, and their weighted sum of values. Blocks are counted from the start of the cache and processed in
// order, and rows are independent. So a row's result depends neither on its neighbours nor on how work is divided.
//
// float32, float16: fused multiply-adds in float32, in the order of dimensions (scores) and of tokens (sums).
// fp8: a block's keys and values are converted to float32, then as above.
// int8: integer dot products of quantised queries and weights, see attention_int8_impl.h.
#ifndef EDGELM_KERNELS_ATTENTION_IMPL_H_
#define EDGELM_KERNELS_ATTENTION_IMPL_H_

#include "attention_float_impl.h"
#include "attention_fp8_impl.h"
#include "attention_int8_impl.h"
#include "attention_prepare_impl.h"

namespace edgelm {
namespace {

// Attend the rows of the unit to the cache's tokens [begin, end), starting a new softmax.
inline void AttendTokens(const Unit& u, int64_t begin, int64_t end) {
  for (int64_t r = 0; r < u.rows; ++r) {
    u.tops[r] = -INFINITY;
    u.sums[r] = 0.0f;
    u.weights[r] = 0.0f;
  }
  std::memset(u.accumulators, 0, 4 * u.rows * u.at.width);
  for (int64_t block = begin; block < end; block += kKeyBlock) {
    const int64_t count = end - block < kKeyBlock ? end - block : kKeyBlock;
    // Rows of tokens before the block do not see it.
    const int64_t before = block - u.call->past - u.first, from = before > 0 ? before * u.call->group() : 0;
    switch (u.call->cache) {
      case CacheKind::kFloat32: AttendFloat<float>(u, from, block, count); break;
      case CacheKind::kFloat16: AttendFloat<uint16_t>(u, from, block, count); break;
      case CacheKind::kFp8: AttendFp8(u, from, block, count); break;
      case CacheKind::kInt8:
        u.call->split_kv() ? AttendInt8<true>(u, from, block, count) : AttendInt8<false>(u, from, block, count);
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
  const int64_t splits = call.splits(), group = call.group();
  if (call.split_kv()) {
    const int64_t head = unit / splits, split = unit % splits, begin = split * kSplitTokens;
    const Unit u = MakeUnit(call, head, 0, call.rows, workspace);
    AttendTokens(u, begin, begin + kSplitTokens < call.total() ? begin + kSplitTokens : call.total());
    for (int64_t r = 0; r < u.rows; ++r) {
      const float* acc = u.accumulators + r * u.at.width;
      if (splits == 1) {
        FinishRow(call, r / group, head * group + r % group, acc, u.sums[r]);
        continue;
      }
      const int64_t at = (u.query + r) * splits + split;
      reinterpret_cast<float*>(call.scratch + u.at.tops)[at] = u.tops[r];
      reinterpret_cast<float*>(call.scratch + u.at.sums)[at] = u.sums[r];
      std::memcpy(reinterpret_cast<float*>(call.scratch + u.at.partials) + at * u.at.width, acc, 4 * u.at.width);
    }
    return;
  }
  // Order the units from the last block, which sees most tokens, to the first: the last unit to start is then short.
  const int64_t head = unit % call.kv_heads, first = (call.blocks() - 1 - unit / call.kv_heads) * call.block_rows();
  const int64_t tokens = call.rows - first < call.block_rows() ? call.rows - first : call.block_rows();
  const Unit u = MakeUnit(call, head, first, tokens, workspace);
  AttendTokens(u, 0, call.past + first + tokens);
  for (int64_t r = 0; r < u.rows; ++r)
    FinishRow(call, first + r / group, head * group + r % group, u.accumulators + r * u.at.width, u.sums[r]);
}

void AttentionCombine(const Attention& call, int64_t unit) {
  const AttentionLayout at(call);
  const int64_t head = unit / call.rows, token = unit % call.rows, group = call.group(), all = call.splits();
  // Splits that begin after the token hold no result for it.
  const int64_t splits = (call.past + token) / kSplitTokens + 1;
  for (int64_t g = 0; g < group; ++g) {
    const int64_t row = unit * group + g;
    const float* tops = reinterpret_cast<const float*>(call.scratch + at.tops) + row * all;
    const float* sums = reinterpret_cast<const float*>(call.scratch + at.sums) + row * all;
    float* partials = reinterpret_cast<float*>(call.scratch + at.partials) + row * all * at.width;
    float top = tops[0], sum = 0.0f;
    for (int64_t i = 1; i < splits; ++i) top = tops[i] > top ? tops[i] : top;
    for (int64_t i = 0; i < splits; ++i) {
      float factor[16];
      Store(factor, Exp(Splat(tops[i] - top)));
      sum = __builtin_fmaf(sums[i], factor[0], sum);
      for (int64_t d = 0; d < at.width; d += 16) {  // accumulate in the first split's partials
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
