// Causal attention with grouped heads over a cache of keys and values, in three steps that the caller runs one after
// another, each cut into units that may run at the same time, in any order and on any threads:
//
//   prepare   queries, keys, values of the new tokens: QK-norm, clip, rotary embedding; keys and values into the cache
//   attend    scores, online softmax and weighted sum (Milakov & Gimelshein 2018, arXiv 1805.02867; Dao et al. 2022,
//             arXiv 2205.14135); few new tokens: split over pieces of the cache, else over blocks of the new tokens
//   combine   the pieces' results into one; no units where nothing was split
//
// What a unit is depends on the call alone, never on threads: results are the same however units are spread.
//
// Cache of one sequence: [kv_heads] x capacity x AttentionRowBytes() bytes, for keys and for values. What lies where
// within a head's bytes is this kernel's own: tiles of 16 tokens, in each all tokens' elements and then, for int8 and
// fp8, their scales. Keys lie dimension by dimension (int8: four by four), so that lanes are tokens; values token by
// token (int8: four tokens by four), so that lanes are dimensions. A token's bytes are its own: tokens may be dropped
// from the end and written again, and whatever lies beyond the valid tokens is never used.
#ifndef EDGELM_KERNELS_ATTENTION_H_
#define EDGELM_KERNELS_ATTENTION_H_

#include <cstdint>

#include "kernels/layout.h"

namespace edgelm {

enum class CacheKind : uint8_t {
  kFloat32,
  kFloat16,
  kInt8,  // one float32 scale per head and token, for the key and for the value
  kFp8,   // E4M3, one bfloat16 scale per head and token: largest magnitude / 448, rounded up so that none is above 448
};

constexpr int64_t kPrepareRows = 16;   // tokens of a unit of `prepare`
constexpr int64_t kFewRows = 8;        // at most so many new tokens: split over the cache
constexpr int64_t kCachePiece = 512;   // tokens of such a piece
constexpr int64_t kQueryRows = 64;     // else: tokens x query heads of a KV head that a unit of `attend` serves, about

// Bytes a token takes of one head's keys, and again of its values.
EDGELM_INLINE int64_t AttentionRowBytes(CacheKind cache, int64_t head_dim) {
  switch (cache) {
    case CacheKind::kFloat32: return 4 * head_dim;
    case CacheKind::kFloat16: return 2 * head_dim;
    case CacheKind::kInt8: return head_dim + 4;
    case CacheKind::kFp8: return head_dim + 2;
  }
  return 0;
}

// One sequence's new tokens. All pointers are the caller's; nothing overlaps.
struct Attention {
  CacheKind cache = CacheKind::kFloat32;
  int64_t heads = 0, kv_heads = 0;  // a multiple of kv_heads: query head h reads KV head h / (heads / kv_heads)
  int64_t head_dim = 0;             // even
  int64_t capacity = 0;             // tokens the cache holds: past + rows at least
  int64_t past = 0;                 // valid tokens in the cache
  int64_t rows = 0;                 // new tokens, 1 at least: tokens past .. past + rows - 1
  float scale = 0.0f;               // of the scores; 0 for 1 / sqrt(head_dim)
  float clip = 0.0f;                // queries, keys and values are clamped to -clip .. clip after the norm; 0: not
  float epsilon = 0.0f;             // of the norms
  const float* q_norm = nullptr;    // weight of the queries' RMSNorm, or null
  const float* k_norm = nullptr;    // of the keys'
  bool q_norm_per_head = false;     // true: q_norm is [head_dim], each head is normed by itself;
  bool k_norm_per_head = false;     // false: [heads * head_dim], [kv_heads * head_dim], all heads are normed as one
  const float* cos = nullptr;       // [past + rows at least, head_dim / 2], row = position
  const float* sin = nullptr;
  const float* qkv = nullptr;       // [rows, (heads + 2 kv_heads) * head_dim]
  uint8_t* key = nullptr;           // [kv_heads, capacity, AttentionRowBytes]
  uint8_t* value = nullptr;
  float* out = nullptr;             // [rows, heads * head_dim]
  uint8_t* scratch = nullptr;       // AttentionScratchBytes, aligned to 64; kept from `prepare` to `combine`

  EDGELM_INLINE int64_t group() const { return heads / kv_heads; }
  EDGELM_INLINE int64_t total() const { return past + rows; }
  EDGELM_INLINE bool split() const { return rows <= kFewRows; }
  // Pieces of the cache, or blocks of new tokens.
  EDGELM_INLINE int64_t pieces() const { return split() ? (total() + kCachePiece - 1) / kCachePiece : 1; }
  EDGELM_INLINE int64_t block_rows() const {
    return split() ? rows : group() >= kQueryRows ? 1 : kQueryRows / group();
  }
  EDGELM_INLINE int64_t blocks() const { return (rows + block_rows() - 1) / block_rows(); }

  EDGELM_INLINE int64_t prepare_units() const { return (rows + kPrepareRows - 1) / kPrepareRows; }
  EDGELM_INLINE int64_t attend_units() const { return kv_heads * pieces() * blocks(); }
  EDGELM_INLINE int64_t combine_units() const { return pieces() == 1 ? 0 : rows * kv_heads; }
};

// Tokens of a step of the online softmax, and of a tile of the cache.
constexpr int64_t kKeyBlock = 128;
constexpr int64_t kCacheTile = 16;

EDGELM_INLINE int64_t RoundUp(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Where things lie in `scratch` and in a workspace, in bytes from its start. A query row is (KV head, token, head of
// the group), in this order.
struct AttentionLayout {
  int64_t width;                                              // head_dim rounded up to whole vectors
  int64_t most;                                               // query rows of a unit
  int64_t queries, query_scales, query_sums;                  // scratch: float32 or int8 [query rows, width]
  int64_t tops, sums, partials, scratch_bytes;                // scratch: [query rows, pieces] and [.., width]
  int64_t scores, accumulators, state, codes, keys, values;   // workspace
  int64_t workspace_bytes;

  EDGELM_INLINE explicit AttentionLayout(const Attention& call) {
    width = RoundUp(call.head_dim, 16);
    const int64_t query_rows = call.rows * call.heads, split = call.pieces() == 1 ? 0 : query_rows * call.pieces();
    queries = 0;
    query_scales = queries + query_rows * width * (call.cache == CacheKind::kInt8 ? 1 : 4);
    query_sums = query_scales + RoundUp(4 * query_rows, 64);
    tops = query_sums + RoundUp(4 * query_rows, 64);
    sums = tops + RoundUp(4 * split, 64);
    partials = sums + RoundUp(4 * split, 64);
    scratch_bytes = partials + 4 * split * width;

    most = kFewRows * call.group() > kQueryRows ? kFewRows * call.group() : kQueryRows;
    scores = 0;
    accumulators = scores + 4 * most * kKeyBlock;
    state = accumulators + 4 * most * width;
    codes = state + RoundUp(4 * 10 * most, 64);
    keys = codes + 2 * most * kKeyBlock;
    values = keys + 4 * kKeyBlock * (width + 16);
    workspace_bytes = values + 4 * kKeyBlock * (width + 16);
  }
};

// Bytes of `scratch` for a call (the pointers need not be set): it may grow with `past`, ask at every call.
EDGELM_INLINE int64_t AttentionScratchBytes(const Attention& call) { return AttentionLayout(call).scratch_bytes; }
// Bytes of the workspace of each `prepare` or `attend` that runs at the same time as others; it keeps nothing between
// units, and its size depends on the head counts and head_dim only.
EDGELM_INLINE int64_t AttentionWorkspaceBytes(const Attention& call) { return AttentionLayout(call).workspace_bytes; }

// Each does one unit, 0 .. its count of units - 1. `workspace` is aligned to 64.
struct AttentionKernels {
  void (*prepare)(const Attention& call, int64_t unit, uint8_t* workspace);
  void (*attend)(const Attention& call, int64_t unit, uint8_t* workspace);
  void (*combine)(const Attention& call, int64_t unit);
};

}  // namespace edgelm

#endif  // EDGELM_KERNELS_ATTENTION_H_
