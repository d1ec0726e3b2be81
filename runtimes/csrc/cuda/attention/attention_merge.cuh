// Merges the attention results of warps, or of blocks, that each processed a part of the keys.
//
// The result for a part of the keys is: the row's largest score m (base 2), the sum of the weights 2^(score - m), and
// the sum of the values with these weights. For a row that saw no key, m is -infinity and the rest is 0.
#pragma once

#include "attention/attention_rows.cuh"

namespace edgelm {

struct RowMerge {
  float largest = -bits_to_float(0x7f800000u), total = 0.f;
  float sums[4] = {0.f, 0.f, 0.f, 0.f};

  // Call see() for every part before the first add().
  EDGELM_INLINE void see(float m) { largest = max_(largest, m); }
  EDGELM_INLINE void add(float m, float of_total, const float (&of_sums)[4]) {
    const float weight = m > -bits_to_float(0x7f800000u) ? exp2_fast(m - largest) : 0.f;
    total = fma_(weight, of_total, total);
    EDGELM_UNROLL
    for (int i = 0; i < 4; ++i) sums[i] = fma_(weight, of_sums[i], sums[i]);
  }
  template <class A> EDGELM_INLINE void write(A* out, bool seen) const {
    const float factor = 1.f / total;
    const float x[4] = {seen ? sums[0] * factor : 0.f, seen ? sums[1] * factor : 0.f, seen ? sums[2] * factor : 0.f,
                        seen ? sums[3] * factor : 0.f};
    store_four(out, x);
  }
};

// Merge four columns of a row of the block from all splits. Several are loaded at a time: they were written by other
// blocks, and the whole launch waits for this step.
template <int S, int block_rows>
EDGELM_DEVICE RowMerge merge_row(const AttentionArgs& args, const BlockOfRows& block, int row, int column) {
  constexpr int kBatch = 16;
  const i64 first = block.number(args) * args.splits * block_rows + row;
  RowMerge merge;
  for (int start = 0; start < block.active; start += kBatch) {
    Words2 totals[kBatch];
    Words4 sums[kBatch];
    EDGELM_UNROLL
    for (int i = 0; i < kBatch; ++i) {
      const i64 at = first + i64(min_(start + i, block.active - 1)) * block_rows;
      totals[i] = load8(args.totals + 2 * at);
      sums[i] = load16(args.partials + at * S + column);
    }
    const RowMerge before = merge;
    merge = RowMerge{};
    merge.see(before.largest);
    EDGELM_UNROLL
    for (int i = 0; i < kBatch; ++i) {
      if (start + i >= block.active) totals[i].x = float_to_bits(-bits_to_float(0x7f800000u));
      merge.see(bits_to_float(totals[i].x));
    }
    merge.add(before.largest, before.total, before.sums);
    EDGELM_UNROLL
    for (int i = 0; i < kBatch; ++i) {
      const float of_sums[4] = {bits_to_float(sums[i].x), bits_to_float(sums[i].y), bits_to_float(sums[i].z),
                                bits_to_float(sums[i].w)};
      merge.add(bits_to_float(totals[i].x), bits_to_float(totals[i].y), of_sums);
    }
  }
  return merge;
}

// Merge the results of all splits of the block's rows.
template <class A, int S, int block_rows>
EDGELM_DEVICE void merge_splits(const AttentionArgs& args, const BlockOfRows& block) {
  const int rows = min_(block_rows, block.rows - block.first);
  for (int i = thread(); i < rows * (S / 4); i += block_threads()) {
    const int row = i / (S / 4), column = i % (S / 4) * 4;
    A* out = static_cast<A*>(args.out) + block.out_offset(args, block.first + row, S) + column;
    merge_row<S, block_rows>(args, block, row, column).write(out, block.first + row < block.fresh_rows);
  }
}

// -- a block of 16 rows, of which each warp saw some keys -------------------------------------------------------------

template <int S> struct MergedRows {
  static constexpr int kRows = 16;
  float* sums;    // [warps, rows, S]
  float* totals;  // [warps, rows, 2]

  explicit EDGELM_INLINE MergedRows(u8* shared)
      : sums(reinterpret_cast<float*>(shared)), totals(sums + kAttentionWarps * kRows * S) {}

  template <class Rows> EDGELM_INLINE void put(const Rows& rows, int warp, int lane) {
    EDGELM_UNROLL
    for (int i = 0; i < 2; ++i) {
      const int row = warp * kRows + lane / 4 + 8 * i;
      EDGELM_UNROLL
      for (int n = 0; n < Rows::kPairs; ++n) {
        float low, high;
        rows.pair(n, i, low, high);
        store8(sums + row * S + Rows::column(n), {float_to_bits(low), float_to_bits(high)});
      }
      if (lane % 4 == 0) {
        totals[2 * row] = rows.largest[i];
        totals[2 * row + 1] = rows.total[i];
      }
    }
  }

  EDGELM_INLINE RowMerge merge(int row, int column) const {
    RowMerge merge;
    for (int w = 0; w < kAttentionWarps; ++w) merge.see(totals[2 * (w * kRows + row)]);
    for (int w = 0; w < kAttentionWarps; ++w) {
      const int at = w * kRows + row;
      const float* four = sums + at * S + column;
      merge.add(totals[2 * at], totals[2 * at + 1], {four[0], four[1], four[2], four[3]});
    }
    return merge;
  }

  template <class A> EDGELM_INLINE void write(const AttentionArgs& args, const BlockOfRows& block) const {
    for (int i = thread(); i < block.rows * (S / 4); i += block_threads()) {
      const int row = i / (S / 4), column = i % (S / 4) * 4;
      merge(row, column)
          .template write<A>(static_cast<A*>(args.out) + block.out_offset(args, row, S) + column,
                             row < block.fresh_rows);
    }
  }

  EDGELM_INLINE void write_partial(const AttentionArgs& args, const BlockOfRows& block) const {
    const i64 first = (block.number(args) * args.splits + block.split) * kRows;
    for (int i = thread(); i < block.fresh_rows * (S / 4); i += block_threads()) {
      const int row = i / (S / 4), column = i % (S / 4) * 4;
      const RowMerge merged = merge(row, column);
      store_four(args.partials + (first + row) * S + column, merged.sums);
      if (column == 0) {
        store8(args.totals + 2 * (first + row), {float_to_bits(merged.largest), float_to_bits(merged.total)});
      }
    }
  }
};

// -- a block of which each warp has its own rows ----------------------------------------------------------------------

template <class A, int S, int block_rows, class Rows>
EDGELM_DEVICE void write_tile(const AttentionArgs& args, const BlockOfRows& block, const Rows& rows, int warp_row,
                              int lane) {
  EDGELM_UNROLL
  for (int i = 0; i < Rows::kRows / 8; ++i) {
    const int row = warp_row + lane / 4 + 8 * i;
    if (row >= block.rows) continue;
    if (block.active == 1) {
      A* out = static_cast<A*>(args.out) + block.out_offset(args, row, S);
      const bool seen = row < block.fresh_rows;
      const float factor = 1.f / rows.total[i];
      EDGELM_UNROLL
      for (int n = 0; n < Rows::kPairs; ++n) {
        float low, high;
        rows.pair(n, i, low, high);
        store4(out + Rows::column(n), seen ? pack2<A>(low * factor, high * factor) : 0);
      }
    } else {
      const i64 at = (block.number(args) * args.splits + block.split) * block_rows + row - block.first;
      EDGELM_UNROLL
      for (int n = 0; n < Rows::kPairs; ++n) {
        float low, high;
        rows.pair(n, i, low, high);
        store8(args.partials + at * S + Rows::column(n), {float_to_bits(low), float_to_bits(high)});
      }
      if (lane % 4 == 0) {
        store8(args.totals + 2 * at, {float_to_bits(rows.largest[i]), float_to_bits(rows.total[i])});
      }
    }
  }
}

}  // namespace edgelm
