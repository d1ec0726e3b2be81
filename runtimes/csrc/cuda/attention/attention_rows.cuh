// The rows and keys of a block, and the place of its results.
#pragma once

#include "attention/attention_cache.cuh"

namespace edgelm {

struct BlockOfRows {
  int b, g, split;
  int block;      // number of the block of rows
  int shared_by;  // query heads of a KV head
  Divisor by_shared;
  int first;             // its first row
  int rows, fresh_rows;  // of this (b, g): all, and those that are not padding
  int past;
  int end;            // keys that at least one row of the block sees
  int tiles, active;  // tiles of keys, and splits with at least one tile. 0 tiles: all rows are padding

  // The number of keys that row r sees; padding rows see none.
  EDGELM_INLINE int limit(int r) const { return r < fresh_rows ? past + divide(r, by_shared) + 1 : 0; }

  // Offset of row r in the result.
  EDGELM_INLINE i64 out_offset(const AttentionArgs& args, int r, int size) const {
    const int token = divide(r, by_shared);
    return ((i64(b) * args.tokens + token) * args.heads + g * shared_by + r - token * shared_by) * size;
  }

  EDGELM_INLINE i64 number(const AttentionArgs& args) const {
    return (i64(b) * args.kv_heads + g) * args.row_blocks + block;
  }

  // Whether this block is the last of its rows' splits to finish, so that all results are written. The last block
  // resets the counter. `flag` is shared memory.
  EDGELM_INLINE bool is_last(const AttentionArgs& args, int* flag) const {
    fence_device();
    sync_block();
    if (thread() == 0) {
      int* counter = args.counters + number(args);
      const bool last = atomic_add(counter, 1) == active - 1;
      if (last) *counter = 0;
      *flag = last;
    }
    sync_block();
    fence_device();
    return *flag != 0;
  }
};

// Blocks with the most keys start first.
template <int block_rows> EDGELM_DEVICE BlockOfRows block_of_rows(const AttentionArgs& args) {
  BlockOfRows block;
  block.b = block_z();
  block.g = block_y();
  // There is one block of rows where they are few.
  const int quotient = block_rows == 16 ? 0 : divide(block_x(), args.splits_divisor);
  block.split = block_x() - quotient * args.splits;
  block.block = block_rows == 16 ? 0 : args.row_blocks - 1 - quotient;
  block.shared_by = args.shared_by;
  block.by_shared = args.shared_by_divisor;
  block.first = block.block * block_rows;
  const Lengths lengths = lengths_of(args, block.b);
  block.rows = args.tokens * block.shared_by;
  block.fresh_rows = lengths.fresh * block.shared_by;
  block.past = lengths.past;
  block.end = block.first < block.fresh_rows ? block.limit(min_(block.first + block_rows, block.fresh_rows) - 1) : 0;
  block.tiles = (block.end + kTileKeys - 1) / kTileKeys;
  block.active = min_(args.splits, block.tiles);
  return block;
}

template <class A> EDGELM_DEVICE void store_four(A* to, const float (&x)[4]) {
  if constexpr (sizeof(A) == 4) {
    store16(to, {float_to_bits(x[0]), float_to_bits(x[1]), float_to_bits(x[2]), float_to_bits(x[3])});
  } else {
    store8(to, {pack2<A>(x[0], x[1]), pack2<A>(x[2], x[3])});
  }
}

template <class A, int S, int block_rows>
EDGELM_DEVICE void clear_rows(const AttentionArgs& args, const BlockOfRows& block) {
  const float zeros[4] = {0.f, 0.f, 0.f, 0.f};
  const int rows = min_(block_rows, block.rows - block.first);
  for (int i = thread(); i < rows * (S / 4); i += block_threads()) {
    const i64 row = block.out_offset(args, block.first + i / (S / 4), S);
    store_four(static_cast<A*>(args.out) + row + i % (S / 4) * 4, zeros);
  }
}

}  // namespace edgelm
