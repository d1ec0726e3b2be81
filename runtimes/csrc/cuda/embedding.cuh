// Kernels for the first and last steps of a model: embedding lookup, the last token's row, argmax of the logits.
#pragma once

#include "linear/linear_output.cuh"
#include "rows_args.cuh"

namespace edgelm {

constexpr int kEndThreads = 256;

// Grid: (rows, parts of the columns).
template <class W> EDGELM_BODY void quant_embedding(const EmbeddingArgs& args) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  int id = args.ids[block_x()];
  if (id < 0 || id >= args.n) id = 0;
  const int block = id / kTileRows, g = id % 8, high = id / 8 % 2;
  const int tiles = args.k / Format<W>::columns;
  const int groups = Is<W>::scaled ? args.k / args.group : 1;
  for (int i = block_y() * block_threads() + thread(); i < tiles * 4; i += grid_y() * block_threads()) {
    const int tile = i / 4, q = i % 4;
    const Words4 words = load16(args.codes + (i64(block) * tiles + tile) * kTileBytes + (4 * g + q) * 16);
    EDGELM_UNROLL
    for (int j = 0; j < Scalars<W>::count; ++j) {
      const int column = tile * Format<W>::columns + column_of<W>(j, q);
      // The register is chosen at compile time in both cases.
      float value = high ? number_of<W>(words, 1, j) : number_of<W>(words, 0, j);
      if constexpr (Is<W>::scaled) {
        const i64 index = (i64(block) * groups + column / args.group) * kTileRows + id % kTileRows;
        if constexpr (Is<W>::integer) value -= float(args.zeros ? int(args.zeros[index]) : middle<W>());
        value *= scale_at<W>(args.scales, index);
      }
      args.y[i64(block_x()) * args.k + column] = value;
    }
  }
}

template <class A> EDGELM_BODY void last_token(const LastTokenArgs& args) {
  static_assert(Same<A, float>::value, "the residual stream is float32");
  let_next_kernel_start();
  wait_for_previous_kernel();
  const float* from = args.x + ((i64(block_x()) + 1) * args.tokens - 1) * args.k;
  for (int k = thread(); k < args.k; k += block_threads()) args.y[i64(block_x()) * args.k + k] = from[k];
}

// Argmax of each row; the first of equal values. NaN is never chosen; a row of NaN gives id -1.
// Two kernels: top_parts finds the best of each part of a row, top_all the best of the parts.
EDGELM_DEVICE bool is_better(float a, int a_id, float b, int b_id) {
  if (a_id < 0 || b_id < 0) return b_id < 0 && a_id >= 0;
  return a > b || (a == b && a_id < b_id);
}

// Reduce to the best (value, id) of all threads; every thread gets it. `scratch` holds two words per warp.
EDGELM_DEVICE void block_best(float& value, int& id, float* scratch) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    const float other = shuffle_xor(value, mask);
    const int other_id = shuffle_xor(id, mask);
    if (is_better(other, other_id, value, id)) {
      value = other;
      id = other_id;
    }
  }
  const int warps = block_threads() / kWarp;
  int* ids = reinterpret_cast<int*>(scratch + warps);
  if (thread() % kWarp == 0) {
    scratch[thread() / kWarp] = value;
    ids[thread() / kWarp] = id;
  }
  sync_block();
  for (int i = 0; i < warps; ++i) {
    if (is_better(scratch[i], ids[i], value, id)) {
      value = scratch[i];
      id = ids[i];
    }
  }
  sync_block();
}

// The best of n candidates, for every thread. Candidate i is (values[i], ids ? ids[i] : first + i); negative ids are
// skipped.
EDGELM_DEVICE void best_of(const float* values, const i32* ids, int first, int n, float& value, int& id) {
  value = 0.f;
  id = -1;
  for (int i = thread(); i < n; i += block_threads()) {
    const float x = values[i];
    const int x_id = is_nan(x) ? -1 : ids ? ids[i] : first + i;
    if (is_better(x, x_id, value, id)) {
      value = x;
      id = x_id;
    }
  }
  block_best(value, id, reinterpret_cast<float*>(shared_memory()));
}

// Grid: (parts, rows).
template <class A> EDGELM_BODY void top_parts(const TopArgs& args) {
  static_assert(Same<A, float>::value, "logits are float32");
  let_next_kernel_start();
  wait_for_previous_kernel();
  const int first = block_x() * args.part, n = min_(args.part, args.n - first);
  float value;
  int id;
  best_of(args.x + i64(block_y()) * args.n + first, nullptr, first, n, value, id);
  if (thread() == 0) {
    const i64 to = i64(block_y()) * args.parts + block_x();
    args.values[to] = value;
    args.ids[to] = id;
  }
}

// Grid: (rows).
template <class A> EDGELM_BODY void top_all(const TopArgs& args) {
  static_assert(Same<A, float>::value, "logits are float32");
  let_next_kernel_start();
  wait_for_previous_kernel();
  const i64 from = i64(block_x()) * args.parts;
  float value;
  int id;
  best_of(args.values + from, args.ids + from, 0, args.parts, value, id);
  if (thread() == 0) args.out_ids[block_x()] = id;
}

}  // namespace edgelm
