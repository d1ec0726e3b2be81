// How the matmul kernels write their results.
#pragma once

#include "linear/linear_args.cuh"
#include "weights.cuh"

namespace edgelm {

EDGELM_DEVICE int outputs_of(const LinearArgs& args) { return args.swiglu ? args.n / 2 : args.n; }
EDGELM_DEVICE int blocks_of(const LinearArgs& args) { return (args.n + kTileRows - 1) / kTileRows; }
EDGELM_DEVICE const float* bias_of(const LinearArgs& args) { return args.experts ? nullptr : args.bias; }
EDGELM_DEVICE int source_row(const LinearArgs& args, int slot) { return args.row_map ? args.row_map[slot] : slot; }

EDGELM_DEVICE float silu(float x) { return x / (1.f + exp_(-x)); }

// The scale for rounding a row to E4M3. If absmax is below 2^-100, every number of the row rounds to 0.
EDGELM_DEVICE float fp8_scale(float absmax) { return absmax < 0x1p-100f ? 1.f : absmax / 448.f; }

// x / scale by the reciprocal and one correction: rounded once, as a division is, unless abs(x) is below 2^-100.
EDGELM_DEVICE float divided(float x, float scale, float reciprocal) {
  const float quotient = x * reciprocal;
  return fma_(fma_(-quotient, scale, x), reciprocal, quotient);
}

template <class A> EDGELM_DEVICE void put(const LinearArgs& args, int slot, int column, float value) {
  const int outputs = outputs_of(args);
  if (column >= outputs) return;
  const i64 at = i64(slot) * outputs + column;
  if (bias_of(args)) value += bias_of(args)[column];
  if (args.residual) value += args.residual[at];
  if (args.y_float) static_cast<float*>(args.y)[at] = value;
  else static_cast<A*>(args.y)[at] = from_float<A>(value);
}

// Write the results of rows g and g + 8 of a block of 16.
template <class A> EDGELM_DEVICE void put_pair(const LinearArgs& args, int slot, int block, int g, float low,
                                               float high) {
  if (args.swiglu) {
    put<A>(args, slot, block * 8 + g, silu(low) * high);
  } else {
    put<A>(args, slot, block * kTileRows + g, low);
    put<A>(args, slot, block * kTileRows + g + 8, high);
  }
}

}  // namespace edgelm
