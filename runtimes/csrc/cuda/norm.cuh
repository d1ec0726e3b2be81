// Kernels over rows of activations: RMSNorm, type conversion, rounding to E4M3.
#pragma once

#include "linear/linear_output.cuh"
#include "rows_args.cuh"

namespace edgelm {

constexpr int kRowThreads = 256;

// Load two neighbouring numbers of a row of float, bfloat16 or float16.
template <class A> EDGELM_DEVICE void load_pair(const A* from, float& low, float& high) {
  if constexpr (Same<A, float>::value) {
    const Words2 both = load8(from);
    low = bits_to_float(both.x);
    high = bits_to_float(both.y);
  } else {
    unpack2<A>(load4(from), low, high);
  }
}

// One block per row. Y float or A: y = x * rsqrt(mean(x^2) + epsilon) * norm. If round_scale is not 0, results are
// rounded to E4M3 codes times the row's scale: the numbers go to y, the scale to `scales`.
// Y e4m3: writes the codes, each 16 in the order 0 1 8 9, 2 3 10 11, 4 5 12 13, 6 7 14 15.
template <class A, class Y> EDGELM_BODY void convert_rows(const RowsArgs& args) {
  float* scratch = reinterpret_cast<float*>(shared_memory());
  let_next_kernel_start();
  wait_for_previous_kernel();
  const i64 base = i64(block_x()) * args.k;
  const auto pair = [&](int column, float& low, float& high) {
    if (args.x_float) {
      load_pair(static_cast<const float*>(args.x) + base + column, low, high);
    } else if constexpr (!Same<A, float>::value) {
      load_pair(static_cast<const A*>(args.x) + base + column, low, high);
    }
  };
  float inverse = 1.f;
  if (args.norm) {
    float squares = 0.f;
    for (int k = 2 * thread(); k < args.k; k += 2 * block_threads()) {
      float low, high;
      pair(k, low, high);
      squares = fma_(low, low, fma_(high, high, squares));
    }
    inverse = rsqrt_(block_sum(squares, scratch) / float(args.k) + args.epsilon);
  }
  float scale = args.round_scale;
  if (args.round_scale < 0.f) {
    float largest = 0.f;
    for (int k = 2 * thread(); k < args.k; k += 2 * block_threads()) {
      float low, high;
      pair(k, low, high);
      if (args.norm) {
        low *= inverse * args.norm[k];
        high *= inverse * args.norm[k + 1];
      }
      largest = max_(largest, max_(abs_(low), abs_(high)));
    }
    largest = warp_max(largest);
    if (thread() % kWarp == 0) scratch[thread() / kWarp] = largest;
    sync_block();
    for (int i = 0; i < block_threads() / kWarp; ++i) largest = max_(largest, scratch[i]);
    scale = fp8_scale(largest);
  }
  if (args.scales && thread() == 0) args.scales[block_x()] = scale;
  for (int k = 2 * thread(); k < args.k; k += 2 * block_threads()) {
    float low, high;
    pair(k, low, high);
    if (args.norm) {
      low = low * inverse * args.norm[k];
      high = high * inverse * args.norm[k + 1];
    }
    if constexpr (Same<Y, e4m3>::value) {
      const int to = k / 16 * 16 + k % 8 * 2 + k / 8 % 2 * 2;
      const u16 codes = u16(from_float<e4m3>(low / scale).bits | from_float<e4m3>(high / scale).bits << 8);
      reinterpret_cast<u16*>(static_cast<u8*>(args.y) + base + to)[0] = codes;
    } else {
      if (args.round_scale != 0.f) {
        low = to_float(from_float<e4m3>(low / scale));
        high = to_float(from_float<e4m3>(high / scale));
      }
      if constexpr (Same<Y, float>::value) {
        store8(static_cast<float*>(args.y) + base + k, {float_to_bits(low), float_to_bits(high)});
      } else {
        store4(static_cast<Y*>(args.y) + base + k, pack2<Y>(low, high));
      }
    }
  }
}

// y = residual + x * rsqrt(mean(x^2) + epsilon) * weight, one block per row.
template <class A> EDGELM_BODY void rms_norm(const RmsNormArgs& args) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const i64 base = i64(block_x()) * args.k;
  const A* x = static_cast<const A*>(args.x) + base;
  float squares = 0.f, low, high;
  for (int k = 2 * thread(); k < args.k; k += 2 * block_threads()) {
    load_pair(x + k, low, high);
    squares = fma_(low, low, fma_(high, high, squares));
  }
  float* scratch = reinterpret_cast<float*>(shared_memory());
  const float inverse = rsqrt_(block_sum(squares, scratch) / float(args.k) + args.epsilon);
  for (int k = 2 * thread(); k < args.k; k += 2 * block_threads()) {
    load_pair(x + k, low, high);
    low = low * inverse * args.weight[k];
    high = high * inverse * args.weight[k + 1];
    if (args.residual) {
      float first, second;
      load_pair(args.residual + base + k, first, second);
      low += first;
      high += second;
    }
    store8(args.y + base + k, {float_to_bits(low), float_to_bits(high)});
  }
}

}  // namespace edgelm
