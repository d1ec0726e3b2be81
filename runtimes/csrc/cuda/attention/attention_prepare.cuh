// Prepares queries, keys and values for attention: QK-norm, clip, rotary embedding, rounding to the cache's type.
#pragma once

#include "attention/attention_rows.cuh"

namespace edgelm {

// One head's vector [S], spread over a warp. A lane holds numbers that are S / 2 apart, the pairs that RoPE rotates.
// For S = 32 half of the lanes hold zeros.
template <int S> struct HeadPart {
  static constexpr int kPairs = S < 64 ? 1 : S / 64;
  float first[kPairs], second[kPairs];
  static EDGELM_INLINE int index(int n) { return thread() % kWarp * kPairs + n; }
  static EDGELM_INLINE bool has(int n) { return index(n) < S / 2; }
};

template <class E, int S> struct HeadCodes {
  E first[HeadPart<S>::kPairs], second[HeadPart<S>::kPairs];
  float scale;
};

EDGELM_DEVICE float clipped(float x, float clip) { return clip > 0.f ? min_(max_(x, -clip), clip) : x; }

// RMSNorm of a head: x * factor * weight, or x where weight is null. `by_itself`: compute the factor from this head
// alone.
struct HeadNorm {
  const float* weight;
  float factor;
  bool by_itself;
};

// The norm of head `index` of the queries, or of the keys. `factor` is the one that all heads share.
template <int S> EDGELM_DEVICE HeadNorm head_norm(const AttentionArgs& args, bool is_query, int index, float factor) {
  const bool by_itself = args.per_head_norms & (is_query ? kQueries : kKeys);
  const float* weight = is_query ? args.q_norm : args.k_norm;
  return {weight == nullptr || by_itself ? weight : weight + index * S, factor, by_itself};
}

// Return 1 / sqrt(mean(x^2) + epsilon) of one head, computed by a warp.
template <class A, int S> EDGELM_DEVICE float head_inverse_rms(const A* x, float epsilon) {
  float squares = 0.f;
  for (int i = thread() % kWarp; i < S; i += kWarp) squares = fma_(to_float(x[i]), to_float(x[i]), squares);
  return rsqrt_(warp_sum(squares) / float(S) + epsilon);
}

// Load a head, norm it, then clip it. All lanes take part.
template <class A, int S>
EDGELM_DEVICE HeadPart<S> load_head(const A* x, HeadNorm norm, float epsilon, float clip) {
  if (norm.by_itself) norm.factor = head_inverse_rms<A, S>(x, epsilon);
  HeadPart<S> part;
  EDGELM_UNROLL
  for (int n = 0; n < HeadPart<S>::kPairs; ++n) {
    part.first[n] = part.second[n] = 0.f;
    if (!HeadPart<S>::has(n)) continue;
    const int i = HeadPart<S>::index(n);
    float first = to_float(x[i]), second = to_float(x[i + S / 2]);
    if (norm.weight != nullptr) {
      first = first * norm.factor * norm.weight[i];
      second = second * norm.factor * norm.weight[i + S / 2];
    }
    part.first[n] = clipped(first, clip);
    part.second[n] = clipped(second, clip);
  }
  return part;
}

template <int S> EDGELM_DEVICE void rotate(HeadPart<S>& part, const AttentionArgs& args, int position) {
  const i64 row = i64(min_(position, args.positions - 1)) * (S / 2);
  EDGELM_UNROLL
  for (int n = 0; n < HeadPart<S>::kPairs; ++n) {
    if (!HeadPart<S>::has(n)) continue;
    const float cos = args.cos[row + HeadPart<S>::index(n)], sin = args.sin[row + HeadPart<S>::index(n)];
    const float first = part.first[n], second = part.second[n];
    part.first[n] = first * cos - second * sin;
    part.second[n] = second * cos + first * sin;
  }
}

// Convert a head to the cache's type E. All lanes take part.
template <class E, int S> EDGELM_DEVICE HeadCodes<E, S> encode_head(const HeadPart<S>& part) {
  HeadCodes<E, S> codes;
  float factor = 1.f;
  codes.scale = 1.f;
  if constexpr (kScaled<E>) {
    float largest = 0.f;
    EDGELM_UNROLL
    for (int n = 0; n < HeadPart<S>::kPairs; ++n) {
      largest = max_(largest, max_(abs_(part.first[n]), abs_(part.second[n])));
    }
    largest = warp_max(largest);
    const bool zero = largest < 1e-30f;  // its reciprocal would be infinite
    codes.scale = zero ? 0.f : largest / kLargestCode<E>;
    factor = zero ? 0.f : kLargestCode<E> / largest;
  }
  EDGELM_UNROLL
  for (int n = 0; n < HeadPart<S>::kPairs; ++n) {
    codes.first[n] = encode<E>(part.first[n] * factor);
    codes.second[n] = encode<E>(part.second[n] * factor);
  }
  return codes;
}

// Store a head as a row of S elements.
template <class E, int S> EDGELM_DEVICE void store_head(E* row, const HeadCodes<E, S>& codes) {
  EDGELM_UNROLL
  for (int n = 0; n < HeadPart<S>::kPairs; ++n) {
    if (!HeadPart<S>::has(n)) continue;
    row[HeadPart<S>::index(n)] = codes.first[n];
    row[HeadPart<S>::index(n) + S / 2] = codes.second[n];
  }
}

// Store a head as a row of queries. For a cache of codes the columns are reordered within 16 to the order in which the
// words of a tile of keys hold them: 0 1 4 5 8 9 12 13, 2 3 6 7 10 11 14 15.
template <class M, class E, int S> EDGELM_DEVICE void store_query(M* row, const HeadPart<S>& part) {
  const auto store = [&](int column, float x) {
    const int i = column % 16;
    const int at = kScaled<E> ? column - i + i / 4 * 2 + i % 2 + (i & 2) * 4 : column;
    row[at] = from_float<M>(x);
  };
  EDGELM_UNROLL
  for (int n = 0; n < HeadPart<S>::kPairs; ++n) {
    if (!HeadPart<S>::has(n)) continue;
    store(HeadPart<S>::index(n), part.first[n]);
    store(HeadPart<S>::index(n) + S / 2, part.second[n]);
  }
}

// Append to the cache of one (b, g).
template <class E, int S>
EDGELM_DEVICE void append(u8* cache, int capacity, int position, const HeadCodes<E, S>& codes) {
  store_head<E, S>(reinterpret_cast<E*>(cache) + i64(position) * S, codes);
  if constexpr (kScaled<E>) {
    if (thread() % kWarp == 0) {
      reinterpret_cast<float*>(cache + i64(capacity) * S)[position] = codes.scale;
    }
  }
}

// Store to a tile in shared memory.
template <class E, int S>
EDGELM_DEVICE void store_to_stage(u8* stage, bool is_key, int row, const HeadCodes<E, S>& codes) {
  using Tile = Stage<E, S>;
  u8* part = stage + (is_key ? 0 : Tile::kValues);
  const auto store = [&](int column, E code) {
    const int byte = column * int(sizeof(E));
    *reinterpret_cast<E*>(part + Tile::at(row, byte / 16) + byte % 16) = code;
  };
  EDGELM_UNROLL
  for (int n = 0; n < HeadPart<S>::kPairs; ++n) {
    if (!HeadPart<S>::has(n)) continue;
    store(HeadPart<S>::index(n), codes.first[n]);
    store(HeadPart<S>::index(n) + S / 2, codes.second[n]);
  }
  if constexpr (kScaled<E>) {
    const int scales = is_key ? Tile::kKeyScales : Tile::kValueScales;
    if (thread() % kWarp == 0) reinterpret_cast<float*>(stage + scales)[row] = codes.scale;
  }
}

// Return 1 / sqrt(mean(x^2) + epsilon) of a row of `width` numbers (a multiple of 8), computed by the whole block.
template <class A> EDGELM_DEVICE float inverse_rms(const A* x, int width, float epsilon, float* scratch) {
  constexpr int kNumbers = 16 / int(sizeof(A));
  float sum = 0.f;
  for (int i = thread(); i < width / kNumbers; i += block_threads()) {
    const Words4 words = load16(x + i * kNumbers);
    const u32 each[4] = {words.x, words.y, words.z, words.w};
    EDGELM_UNROLL
    for (int k = 0; k < 4; ++k) {
      if constexpr (sizeof(A) == 4) {
        sum = fma_(bits_to_float(each[k]), bits_to_float(each[k]), sum);
      } else {
        float low, high;
        unpack2<A>(each[k], low, high);
        sum = fma_(high, high, fma_(low, low, sum));
      }
    }
  }
  return rsqrt_(block_sum(sum, scratch) / float(width) + epsilon);
}

// Prepare one token per block. Grid: (T, B).
template <class A, class E, int S> EDGELM_BODY void attention_prepare(const AttentionArgs& args) {
  using M = MmaType<A, E>;
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int t = block_x(), b = block_y();
  const int heads = args.heads, kv_heads = args.kv_heads, shared_by = args.shared_by;
  if (t == 0 && b == 0) {
    for (int i = thread(); i < grid_y() * kv_heads * args.row_blocks; i += block_threads()) args.counters[i] = 0;
  }
  const Lengths lengths = lengths_of(args, b);
  if (t >= lengths.fresh) return;
  const int position = lengths.past + t;
  float* scratch = reinterpret_cast<float*>(shared_memory());
  const A* row = static_cast<const A*>(args.qkv) + (i64(b) * args.tokens + t) * (heads + 2 * kv_heads) * S;
  float q_factor = 1.f, k_factor = 1.f;
  if (args.q_norm != nullptr) {
    if (!(args.per_head_norms & kQueries)) q_factor = inverse_rms(row, heads * S, args.epsilon, scratch);
    if (!(args.per_head_norms & kKeys)) k_factor = inverse_rms(row + heads * S, kv_heads * S, args.epsilon, scratch);
  }
  M* queries = static_cast<M*>(args.queries);
  for (int head = thread() / kWarp; head < heads + 2 * kv_heads; head += block_threads() / kWarp) {
    const bool is_query = head < heads, is_key = !is_query && head < heads + kv_heads;
    HeadNorm norm = {nullptr, 1.f, false};
    if (is_query) norm = head_norm<S>(args, true, head, q_factor);
    if (is_key) norm = head_norm<S>(args, false, head - heads, k_factor);
    HeadPart<S> part = load_head<A, S>(row + head * S, norm, args.epsilon, args.clip);
    if (is_query || is_key) rotate<S>(part, args, position);
    if (is_query) {
      const int g = divide(head, args.shared_by_divisor);
      const i64 r = ((i64(b) * kv_heads + g) * args.tokens + t) * shared_by + head - g * shared_by;
      store_query<M, E, S>(queries + r * S, part);
    } else {
      const int g = head - heads - (is_key ? 0 : kv_heads);
      u8* cache = (is_key ? args.key_cache : args.value_cache) + cache_offset<E, S>(args, b, g);
      append<E, S>(cache, args.capacity, position, encode_head<E, S>(part));
    }
  }
}

// Prepare what a block of attention_tiles needs of the new tokens (at most 16 rows): store its queries to shared memory
// at `scratch` + 64, rows of S numbers and 16 bytes; store the keys and values of its tiles to the cache. Those of its
// first `ahead` tiles are also stored to their stages: the copies into these stages have begun and have left them out.
template <class A, class E, int S>
EDGELM_DEVICE void prepare_rows(const AttentionArgs& args, const BlockOfRows& block, int first_tile, int end_tile,
                                int ahead, u8* scratch) {
  using M = MmaType<A, E>;
  using Tile = Stage<E, S>;
  constexpr int kStride = S + 8;
  const int warp = thread() / kWarp, warps = block_threads() / kWarp;
  float* sums = reinterpret_cast<float*>(scratch);
  M* queries = reinterpret_cast<M*>(scratch + 64);
  const int chunks = kStride * int(sizeof(M)) / 16;
  for (int i = block.fresh_rows * chunks + thread(); i < 16 * chunks; i += block_threads()) {
    store16(scratch + 64 + 16 * i, {0, 0, 0, 0});
  }
  const int heads = args.heads, kv_heads = args.kv_heads, fresh = divide(block.fresh_rows, block.by_shared);
  for (int t = 0; t < fresh; ++t) {
    const A* row = static_cast<const A*>(args.qkv) + (i64(block.b) * args.tokens + t) * (heads + 2 * kv_heads) * S;
    const int position = block.past + t, tile = position / kTileKeys;
    const bool here = tile >= first_tile && tile < end_tile;
    float q_factor = 1.f, k_factor = 1.f;
    if (args.q_norm != nullptr) {
      if (!(args.per_head_norms & kQueries)) q_factor = inverse_rms(row, heads * S, args.epsilon, sums);
      if (here && !(args.per_head_norms & kKeys)) {
        k_factor = inverse_rms(row + heads * S, kv_heads * S, args.epsilon, sums);
      }
    }
    for (int i = warp; i < block.shared_by + (here ? 2 : 0); i += warps) {
      const bool is_query = i < block.shared_by, is_key = i == block.shared_by;
      const int head = is_query ? block.g * block.shared_by + i : heads + (is_key ? 0 : kv_heads) + block.g;
      HeadNorm norm = {nullptr, 1.f, false};
      if (is_query) norm = head_norm<S>(args, true, head, q_factor);
      if (is_key) norm = head_norm<S>(args, false, block.g, k_factor);
      HeadPart<S> part = load_head<A, S>(row + head * S, norm, args.epsilon, args.clip);
      if (is_query || is_key) rotate<S>(part, args, position);
      if (is_query) {
        store_query<M, E, S>(queries + (t * block.shared_by + i) * kStride, part);
        continue;
      }
      const HeadCodes<E, S> codes = encode_head<E, S>(part);
      u8* cache = (is_key ? args.key_cache : args.value_cache) + cache_offset<E, S>(args, block.b, block.g);
      append<E, S>(cache, args.capacity, position, codes);
      if (tile - first_tile < ahead) {
        u8* stage = scratch - (ahead - (tile - first_tile)) * Tile::kBytes;
        store_to_stage<E, S>(stage, is_key, position % kTileKeys, codes);
      }
    }
  }
}

}  // namespace edgelm
