// Causal grouped-query attention over a KV cache, on the CPU. The caller runs three steps one after another. Each step
// consists of units that may run at the same time, in any order and on any threads:
//
//   prepare   queries, keys and values of the new tokens: QK-norm, clip, rotary embedding; appends keys and values to
//             the cache
//   attend    scores, online softmax and weighted sum (Milakov & Gimelshein 2018, arXiv 1805.02867; Dao et al. 2022,
//             arXiv 2205.14135). With few new tokens the units are splits of the cache, otherwise blocks of new tokens
//   combine   merges the results of the splits; no units where nothing was split
//
// Units depend on the call alone, not on threads, so results are the same on any number of threads.
//
// The cache of one sequence has [kv_heads] x capacity x AttentionRowBytes() bytes for keys, and the same for values.
// The layout within a head: tiles of 16 tokens; each tile holds all tokens' elements and then, for int8 and fp8, their
// scales. Keys are stored dimension by dimension (int8: four by four), so that vector lanes are tokens. Values are
// stored token by token (int8: four tokens by four), so that lanes are dimensions. No byte is shared by two tokens:
// tokens may be dropped from the end and written again, and bytes beyond the valid tokens are never used.
#ifndef EDGELM_KERNELS_ATTENTION_H_
#define EDGELM_KERNELS_ATTENTION_H_

#include <cstdint>

#include "kernels/layout.h"

namespace edgelm {

enum class CacheKind : uint8_t {
  kFloat32,
  kFloat16,
  kInt8,  // one float32 scale per head and token, for the key and for the value each
  kFp8,   // E4M3, one bfloat16 scale per head and token: max abs / 448, rounded up so that no code exceeds 448
};

constexpr int64_t kPrepareRows = 16;   // tokens of a unit of `prepare`
constexpr int64_t kFewRows = 8;        // up to this many new tokens the cache is split
constexpr int64_t kSplitTokens = 512;  // tokens of a split
constexpr int64_t kQueryRows = 64;     // otherwise: query rows of a unit of `attend` (about)

// Bytes of one token's key in one head. Its value takes as many.
EDGELM_INLINE int64_t AttentionRowBytes(CacheKind cache, int64_t head_dim) {
  switch (cache) {
    case CacheKind::kFloat32: return 4 * head_dim;
    case CacheKind::kFloat16: return 2 * head_dim;
    case CacheKind::kInt8: return head_dim + 4;
    case CacheKind::kFp8: return head_dim + 2;
  }
  return 0;
}

// A call for the new tokens of one sequence. The caller owns all memory; no two ranges overlap.
struct Attention {
  CacheKind cache = CacheKind::kFloat32;
  int64_t heads = 0, kv_heads = 0;  // kv_heads divides heads: query head h reads KV head h / (heads / kv_heads)
  int64_t head_dim = 0;             // even
  int64_t capacity = 0;             // tokens that the cache has room for, at least past + rows
  int64_t past = 0;                 // valid tokens in the cache
  int64_t rows = 0;                 // new tokens, at least 1: tokens past .. past + rows - 1
  float scale = 0.0f;               // of the scores; 0 for 1 / sqrt(head_dim)
  float clip = 0.0f;                // queries, keys and values are clamped to -clip .. clip after the norm; 0: no clamp
  float epsilon = 0.0f;             // of the norms
  const float* q_norm = nullptr;    // weight of the queries' RMSNorm, or null
  const float* k_norm = nullptr;    // of the keys'
  bool q_norm_per_head = false;     // true: q_norm is [head_dim], each head is normed separately;
  bool k_norm_per_head = false;     // false: [heads * head_dim], [kv_heads * head_dim], one norm over all heads
  const float* cos = nullptr;       // [past + rows at least, head_dim / 2], row = position
  const float* sin = nullptr;
  const float* qkv = nullptr;  // [rows, (heads + 2 kv_heads) * head_dim]
  uint8_t* key = nullptr;      // [kv_heads, capacity, AttentionRowBytes]
  uint8_t* value = nullptr;
  float* out = nullptr;        // [rows, heads * head_dim]
  uint8_t* scratch = nullptr;  // AttentionScratchBytes, aligned to 64; must be kept from `prepare` to `combine`

  EDGELM_INLINE int64_t group() const { return heads / kv_heads; }
  EDGELM_INLINE int64_t total() const { return past + rows; }
  EDGELM_INLINE bool split_kv() const { return rows <= kFewRows; }
  // Splits of the cache; 1 where blocks of new tokens are the units.
  EDGELM_INLINE int64_t splits() const { return split_kv() ? (total() + kSplitTokens - 1) / kSplitTokens : 1; }
  EDGELM_INLINE int64_t block_rows() const {
    return split_kv() ? rows : group() >= kQueryRows ? 1 : kQueryRows / group();
  }
  EDGELM_INLINE int64_t blocks() const { return (rows + block_rows() - 1) / block_rows(); }

  EDGELM_INLINE int64_t prepare_units() const { return (rows + kPrepareRows - 1) / kPrepareRows; }
  EDGELM_INLINE int64_t attend_units() const { return kv_heads * splits() * blocks(); }
  EDGELM_INLINE int64_t combine_units() const { return splits() == 1 ? 0 : rows * kv_heads; }
};

// Tokens of a step of the online softmax, and of a tile of the cache.
constexpr int64_t kKeyBlock = 128;
constexpr int64_t kCacheTile = 16;

EDGELM_INLINE int64_t RoundUp(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Offsets in `scratch` and in a workspace, in bytes from its start. A query row is (KV head, token, head of the group),
// in this order.
struct AttentionLayout {
  int64_t width;                                             // head_dim rounded up to whole vectors
  int64_t most;                                              // query rows of a unit
  int64_t queries, query_scales, query_sums;                 // scratch: float32 or int8 [query rows, width]
  int64_t tops, sums, partials, scratch_bytes;               // scratch: [query rows, splits] and [.., width]
  int64_t scores, accumulators, state, codes, keys, values;  // workspace
  int64_t workspace_bytes;

  EDGELM_INLINE explicit AttentionLayout(const Attention& call) {
    width = RoundUp(call.head_dim, 16);
    const int64_t query_rows = call.rows * call.heads, split = call.splits() == 1 ? 0 : query_rows * call.splits();
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

// Bytes of `scratch` for a call (its pointers need not be set). They may grow with `past`: compute them for every call.
EDGELM_INLINE int64_t AttentionScratchBytes(const Attention& call) { return AttentionLayout(call).scratch_bytes; }
// Bytes of a workspace. Each `prepare` or `attend` that runs concurrently needs its own. It keeps nothing between
// units, and its size depends only on the head counts and head_dim.
EDGELM_INLINE int64_t AttentionWorkspaceBytes(const Attention& call) { return AttentionLayout(call).workspace_bytes; }

// Each function does one unit, 0 .. its count of units - 1. `workspace` is aligned to 64.
struct AttentionKernels {
  void (*prepare)(const Attention& call, int64_t unit, uint8_t* workspace);
  void (*attend)(const Attention& call, int64_t unit, uint8_t* workspace);
  void (*combine)(const Attention& call, int64_t unit);
};

}  // namespace edgelm

#endif  // EDGELM_KERNELS_ATTENTION_H_
