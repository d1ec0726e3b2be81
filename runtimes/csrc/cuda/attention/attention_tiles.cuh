// Attention on tensor cores. Tiles of 64 keys are copied to shared memory with cp.async while earlier ones are
// computed.
//
// A block has four warps. With few rows (decode) the warps share 16 rows, and each handles 16 keys of a tile, which it
// copies and waits for by itself; their results are merged at the end. With many rows (prefill) each warp has 16 or 32
// rows and all keys.
//
// The keys of a block may be cut into `splits` ranges of tiles. The block that finishes last merges the results in the
// order of the splits, so results do not depend on which block it was.
#pragma once

#include "attention/attention_merge.cuh"
#include "attention/attention_prepare.cuh"
#include "attention/attention_mma.cuh"

namespace edgelm {

// The type of a tile that is multiplied. With many rows a tile of codes is upcast once, rather than by each warp.
template <class M, class E, bool few> struct OperandOf { using Type = E; };
template <class M> struct OperandOf<M, i8, false> { using Type = M; };
template <class M> struct OperandOf<M, e4m3, false> { using Type = M; };

// Shared memory: three stages for few rows; otherwise two, a tile of upcast codes and, for 128 rows, the queries.
template <class E, int S, int block_rows> constexpr int kStagesBytes = (block_rows == 16 ? 3 : 2) * Stage<E, S>::kBytes;
template <class M, class E, int S, int block_rows>
constexpr int kUpcastBytes = kScaled<E> && block_rows != 16 ? Stage<M, S>::kBytes : 0;
template <class M, class E, int S, int block_rows>
constexpr int kTilesBytes = kStagesBytes<E, S, block_rows> + kUpcastBytes<M, E, S, block_rows> +
                            (block_rows == 128 ? 128 * Stage<M, S>::kRow : 0);

// Values that the loop over tiles rarely needs. They are kept in shared memory, since registers are scarce there.
struct LoopState {
  BlockOfRows block;
  const u8* keys;  // of this (b, g)
  const u8* values;
  int first_tile, end_tile;
  int seen_by_all[kAttentionWarps];  // keys that all rows of a warp see; 0: they are padding
  int seen[kAttentionWarps];         // keys that some row of a warp sees
};
constexpr int kLoopStateBytes = 128;
static_assert(sizeof(LoopState) <= kLoopStateBytes, "LoopState does not fit into kLoopStateBytes");

// Split * tiles / active splits: with fewer tiles than splits each has one.
EDGELM_DEVICE int first_tile_of(const AttentionArgs& args, const BlockOfRows& block, int split) {
  return block.active < args.splits ? split : divide(split * block.tiles, args.splits_divisor);
}

template <class E, int S, int warp_rows>
EDGELM_DEVICE LoopState loop_state(const AttentionArgs& args, const BlockOfRows& block, bool few) {
  LoopState state;
  state.block = block;
  state.keys = args.key_cache + cache_offset<E, S>(args, block.b, block.g);
  state.values = args.value_cache + cache_offset<E, S>(args, block.b, block.g);
  state.first_tile = first_tile_of(args, block, block.split);
  state.end_tile = first_tile_of(args, block, block.split + 1);
  EDGELM_UNROLL
  for (int w = 0; w < kAttentionWarps; ++w) {
    const int row = block.first + (few ? 0 : w * warp_rows);
    state.seen_by_all[w] = block.limit(row);
    state.seen[w] = block.limit(min_(row + warp_rows, block.fresh_rows) - 1);
  }
  return state;
}

// Blocks that have no keys request the next matmul's weights for L2. Such blocks exist where the cached tokens are few:
// then the launch waits for latencies and memory is idle. (Blocks beyond the grid would be there for long caches too,
// but then memory is busy.) Nothing waits for the weights.
EDGELM_DEVICE void prefetch_weights(const AttentionArgs& args, const BlockOfRows& block) {
  constexpr i64 kLine = 128;
  const i64 idle = args.splits - block.active, group = i64(block.b) * args.kv_heads + block.g;
  const i64 stride = idle * args.kv_heads * grid_z() * kAttentionThreads * kLine;
  const i64 first = ((group * idle + block.split - block.active) * kAttentionThreads + thread()) * kLine;
  for (i64 at = first; at < args.prefetch_bytes; at += stride) prefetch_l2(args.prefetch + at);
}

// Grid: (row blocks * splits, G, B) blocks of 4 warps. `block_rows`: 16 (few), 64 or 128. `prepares`: each block
// prepares the queries, keys and values that it needs; only with one row block.
// Shared memory: kTilesBytes + kLoopStateBytes. attention.py computes the same size.
template <class A, class E, int S, int block_rows, bool prepares>
EDGELM_BODY void attention_tiles(const AttentionArgs& args) {
  constexpr bool few = block_rows == 16;
  static_assert(few || !prepares, "several blocks of rows would append the same keys");
  using M = MmaType<A, E>;
  using Tile = Stage<E, S>;
  using Operand = typename OperandOf<M, E, few>::Type;
  using Rows = RowTiles<M, Operand, S, block_rows == 128 ? 2 : 1>;
  constexpr bool kUpcasts = !Same<Operand, E>::value;
  constexpr int kStages = few ? 3 : 2;
  constexpr int kKeys = few ? 16 : block_rows == 64 ? 64 : 32;  // at a time, as many as registers have room for
  wait_for_previous_kernel();
  let_next_kernel_start();

  const int warp = thread() / kWarp, lane = thread() % kWarp;
  BlockOfRows block = block_of_rows<block_rows>(args);
  if (block.tiles == 0) {  // nothing but padding
    if (block.split == 0) clear_rows<A, S, block_rows>(args, block);
    return;
  }
  if (block.split >= block.active) {
    if constexpr (prepares) prefetch_weights(args, block);
    return;
  }

  u8* shared = shared_memory();
  LoopState state = loop_state<E, S, Rows::kRows>(args, block, few);
  LoopState* kept = reinterpret_cast<LoopState*>(shared + kTilesBytes<M, E, S, block_rows>);
  if (thread() == 0) *kept = state;
  const int first_tile = state.first_tile, end_tile = state.end_tile;
  const auto load = [&](const LoopState& now, int tile, int skip) {
    u8* stage = shared + (tile - now.first_tile) % kStages * Tile::kBytes;
    constexpr int kCount = few ? 16 : kTileKeys, kLoaders = few ? kWarp : kAttentionThreads;
    load_keys<E, S, kCount, kLoaders>(stage, now.keys, now.values, args.capacity, tile, few ? 16 * warp : 0,
                                      thread() % kLoaders, now.block.end, skip);
  };
  for (int i = 0; i < kStages - 1; ++i) {
    if (first_tile + i < end_tile) load(state, first_tile + i, prepares ? block.past : block.end);
    if (i < kStages - 2) cp_async_commit();
  }

  Rows rows;
  const int warp_row = block.first + (few ? 0 : warp * Rows::kRows);
  const M* queries = static_cast<const M*>(args.queries) + (i64(block.b) * args.kv_heads + block.g) * block.rows * S;
  if constexpr (prepares) {
    // The last stage is not in use yet. Its first part holds the queries, as rows of S numbers and 16 bytes.
    u8* scratch = shared + (kStages - 1) * Tile::kBytes;
    prepare_rows<A, E, S>(args, block, first_tile, end_tile, kStages - 1, scratch);
    sync_block();
    rows.load_queries(reinterpret_cast<const M*>(scratch + 64), S + 8, 16);
    sync_block();
  } else if constexpr (Rows::kQueriesStay) {
    rows.load_queries(queries + i64(warp_row) * S, S, block.rows - warp_row);
  } else {
    constexpr int kQueries = kStagesBytes<E, S, block_rows> + kUpcastBytes<M, E, S, block_rows>;
    load_rows<M, S, block_rows>(shared + kQueries, queries + i64(block.first) * S, block.rows - block.first);
    rows.shared_queries = kQueries + warp * Rows::kRows * Stage<M, S>::kRow;
  }
  cp_async_commit();

  rows.clear();
  const LoopState& now = few ? state : *kept;
  int tile = first_tile;
  do {  // every block has a tile
    cp_async_wait<kStages - 2>();
    if constexpr (few) sync_warp();
    else sync_block();
    if (tile + kStages - 1 < now.end_tile) load(now, tile + kStages - 1, now.block.end);
    cp_async_commit();
    int stage = (tile - now.first_tile) % kStages * Tile::kBytes;
    const float* scales = reinterpret_cast<const float*>(shared + stage + Tile::kKeyScales);
    if constexpr (kUpcasts) {
      upcast_tile<M, E, S>(shared + kStagesBytes<E, S, block_rows>, shared + stage);
      stage = kStagesBytes<E, S, block_rows>;
      sync_block();
    }
    EDGELM_UNROLL_BY(1)
    for (int i = 0; i < (few ? 1 : kTileKeys / kKeys); ++i) {
      const int first = few ? 16 * warp : kKeys * i, position = tile * kTileKeys + first;
      const int seen_by_all = now.seen_by_all[few ? 0 : warp];
      if (seen_by_all == 0 || position >= now.seen[few ? 0 : warp]) break;
      rows.template attend<kKeys, kScaled<E>>(stage, scales, first, position, position + kKeys > seen_by_all,
                                              few ? lane / 4 : warp * Rows::kRows + lane / 4, now.block,
                                              args.scale_base2);
    }
  } while (++tile < now.end_tile);
  cp_async_wait<0>();
  rows.template finish<kScaled<E>>();
  sync_block();  // the stages are free
  block = kept->block;

  if constexpr (few) {
    MergedRows<S> merged(shared);
    merged.put(rows, warp, lane);
    sync_block();
    if (block.active == 1) {
      merged.template write<A>(args, block);
      return;
    }
    merged.write_partial(args, block);
  } else {
    write_tile<A, S, block_rows>(args, block, rows, warp_row, lane);
    if (block.active == 1) return;
  }
  if (block.is_last(args, reinterpret_cast<int*>(shared))) merge_splits<A, S, block_rows>(args, block);
}

}  // namespace edgelm
