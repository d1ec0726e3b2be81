// y = x W^T in float32, one multiply-add at a time: any number of rows, any kind of weights. The debug graph uses it,
// and the other kernels are tested against it.
//
// A warp computes 16 rows of a matrix times kExactTokens tokens at a time. Its lanes read tiles in the way of the
// tensor-core kernels.
#pragma once

#include "linear/linear_output.cuh"

namespace edgelm {

constexpr int kExactTokens = 4;
constexpr int kExactWarps = 8;

// Compute the norm's factor and the rounding scale of a row, by one warp.
EDGELM_DEVICE void exact_row(const LinearArgs& args, const float* x, float& inverse, float& rounding) {
  float squares = 0.f;
  for (int k = thread() % kWarp; k < args.k; k += kWarp) squares = fma_(x[k], x[k], squares);
  squares = warp_sum(squares);
  inverse = args.norm ? rsqrt_(squares / float(args.k) + args.epsilon) : 1.f;
  rounding = args.round_scale;
  if (args.round_scale < 0.f) {
    float largest = 0.f;
    for (int k = thread() % kWarp; k < args.k; k += kWarp) {
      largest = max_(largest, abs_(args.norm ? x[k] * inverse * args.norm[k] : x[k]));
    }
    rounding = fp8_scale(warp_max(largest));
  }
}

template <class W> EDGELM_BODY void linear_exact(const LinearArgs& args) {
  const int warp = thread() / kWarp, lane = thread() % kWarp, g = lane / 4, q = lane % 4;
  const int block = block_x() * kExactWarps + warp;
  float* rows = reinterpret_cast<float*>(shared_memory());  // [tokens][inverse, rounding]
  let_next_kernel_start();
  wait_for_previous_kernel();
  const int expert = args.experts ? block_y() : 0;
  const int first = args.experts ? args.offsets[expert] : 0;
  const int end = args.experts ? args.offsets[expert + 1] : args.rows;
  const int tiles = args.k / Format<W>::columns;
  const int groups = Is<W>::scaled ? args.k / args.group : 1;
  const bool inside = block < blocks_of(args);
  for (int slot0 = first + block_z() * kExactTokens; slot0 < end; slot0 += grid_z() * kExactTokens) {
    const int count = min_(kExactTokens, end - slot0);
    sync_block();
    if (warp < count) {
      const float* x = static_cast<const float*>(args.x) + i64(source_row(args, slot0 + warp)) * args.k;
      float inverse = 1.f, rounding = 0.f;
      if (args.norm || args.round_scale != 0.f) exact_row(args, x, inverse, rounding);
      if (lane == 0) {
        rows[warp * 2] = inverse;
        rows[warp * 2 + 1] = rounding;
      }
    }
    sync_block();
    const float* x[kExactTokens];
    float sums[kExactTokens][2] = {};
    EDGELM_UNROLL
    for (int t = 0; t < kExactTokens; ++t) {
      x[t] = static_cast<const float*>(args.x) + i64(source_row(args, slot0 + min_(t, count - 1))) * args.k;
    }
    for (int tile = 0; inside && tile < tiles; ++tile) {
      const Words4 words = load16_stream(args.codes + expert * args.codes_stride +
                                         (i64(block) * tiles + tile) * kTileBytes + lane * 16);
      EDGELM_UNROLL
      for (int i = 0; i < Scalars<W>::count; ++i) {
        const int k = tile * Format<W>::columns + column_of<W>(i, q);
        float weights[2];
        EDGELM_UNROLL
        for (int h = 0; h < 2; ++h) {
          weights[h] = number_of<W>(words, h, i);
          if constexpr (Is<W>::scaled) {
            const i64 index = (i64(block) * groups + k / args.group) * kTileRows + g + 8 * h;
            if constexpr (Is<W>::integer) {
              weights[h] -= float(args.zeros ? int(args.zeros[expert * args.zeros_stride + index]) : middle<W>());
            }
            weights[h] *= scale_at<W>(args.scales + expert * args.scales_stride, index);
          }
        }
        EDGELM_UNROLL
        for (int t = 0; t < kExactTokens; ++t) {
          float value = x[t][k];
          if (args.norm) value = value * rows[min_(t, count - 1) * 2] * args.norm[k];
          if (args.round_scale != 0.f) value = to_float(from_float<e4m3>(value / rows[min_(t, count - 1) * 2 + 1]));
          sums[t][0] = fma_(weights[0], value, sums[t][0]);
          sums[t][1] = fma_(weights[1], value, sums[t][1]);
        }
      }
    }
    EDGELM_UNROLL
    for (int t = 0; t < kExactTokens; ++t) {
      EDGELM_UNROLL
      for (int h = 0; h < 2; ++h) {
        sums[t][h] += shuffle_xor(sums[t][h], 1);
        sums[t][h] += shuffle_xor(sums[t][h], 2);
      }
      if (t < count && q == 0 && inside) {
        float factor = args.round_scale != 0.f ? rows[t * 2 + 1] : 1.f;
        if (args.x_scales) factor *= args.x_scales[source_row(args, slot0 + t)];
        put_pair<float>(args, slot0 + t, block, g, sums[t][0] * factor, sums[t][1] * factor);
      }
    }
  }
}

}  // namespace edgelm
