// Attention in float32 with one warp per row, without tensor cores. The debug graph uses it.
#pragma once

#include "attention/attention_cache.cuh"

namespace edgelm {

// Grid: (rows / 4, G, B) blocks of 4 warps. Runs after attention_prepare<float, float, S>.
template <int S> EDGELM_BODY void attention_exact(const AttentionArgs& args) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int lane = thread() % kWarp, g = block_y(), b = block_z();
  const int shared_by = args.shared_by;
  const int r = block_x() * kAttentionWarps + thread() / kWarp;
  if (r >= args.tokens * shared_by) return;  // the whole warp; there are no barriers
  const int t = divide(r, args.shared_by_divisor);
  const Lengths lengths = lengths_of(args, b);
  const int limit = t < lengths.fresh ? lengths.past + t + 1 : 0;
  const float* q = static_cast<const float*>(args.queries) +
                   ((i64(b) * args.kv_heads + g) * args.tokens * shared_by + r) * S;
  const float* keys = reinterpret_cast<const float*>(args.key_cache + cache_offset<float, S>(args, b, g));
  const float* values = reinterpret_cast<const float*>(args.value_cache + cache_offset<float, S>(args, b, g));
  float sums[S / kWarp], largest = -bits_to_float(0x7f800000u), total = 0.f;
  EDGELM_UNROLL
  for (int i = 0; i < S / kWarp; ++i) sums[i] = 0.f;
  for (int start = 0; start < limit; start += kWarp) {
    const int count = min_(kWarp, limit - start);
    float score = -bits_to_float(0x7f800000u);
    if (lane < count) {
      const float* key = keys + i64(start + lane) * S;
      float dot = 0.f;
      for (int d = 0; d < S; ++d) dot = fma_(q[d], key[d], dot);
      score = dot * args.scale;
    }
    const float before = largest;
    largest = max_(largest, warp_max(score));
    const float weight = exp_(score - largest), shrink = exp_(before - largest);  // exp(-infinity) is 0
    total = total * shrink + warp_sum(weight);
    EDGELM_UNROLL
    for (int i = 0; i < S / kWarp; ++i) sums[i] *= shrink;
    for (int k = 0; k < count; ++k) {
      const float of_key = shuffle(weight, k);
      const float* value = values + i64(start + k) * S;
      EDGELM_UNROLL
      for (int i = 0; i < S / kWarp; ++i) sums[i] = fma_(of_key, value[lane + kWarp * i], sums[i]);
    }
  }
  float* out = static_cast<float*>(args.out) +
               ((i64(b) * args.tokens + t) * args.heads + g * shared_by + r - t * shared_by) * S;
  EDGELM_UNROLL
  for (int i = 0; i < S / kWarp; ++i) out[lane + kWarp * i] = limit > 0 ? sums[i] / total : 0.f;
}

}  // namespace edgelm
