// Arguments of the attention kernels, the types of KV cache, and conversion of cached codes to tensor-core operands.
#pragma once

#include "attention/attention_args.cuh"
#include "device.cuh"

namespace edgelm {

constexpr int kAttentionThreads = 128;
constexpr int kAttentionWarps = kAttentionThreads / kWarp;

// The type in which a cache of elements E is multiplied: 16-bit elements as they are, codes as activation type A.
template <class A, class E, int bytes = int(sizeof(E))> struct MmaTypeOf { using Type = E; };
template <class A, class E> struct MmaTypeOf<A, E, 1> { using Type = A; };
template <class A, class E> using MmaType = typename MmaTypeOf<A, E>::Type;

// Whether a cache of E has a scale per head and token: int8 and fp8 have.
template <class E> constexpr bool kScaled = sizeof(E) == 1;

template <class E> constexpr float kLargestCode = 0.f;
template <> constexpr float kLargestCode<i8> = 127.f;
template <> constexpr float kLargestCode<e4m3> = 448.f;

template <class E> EDGELM_DEVICE E encode(float x) {
  if constexpr (Same<E, i8>::value) return i8(int(round_(min_(max_(x, -127.f), 127.f))));
  else return from_float<E>(x);
}

// Tokens in the cache, and new tokens. The host checks that they fit; nothing is written beyond the cache.
struct Lengths { int past, fresh; };
EDGELM_DEVICE Lengths lengths_of(const AttentionArgs& args, int b) {
  const int past = min_(max_(args.past_lengths[b], 0), args.capacity);
  int fresh = args.tokens;
  if (args.new_lengths != nullptr) fresh = min_(max_(args.new_lengths[b], 0), fresh);
  return {past, min_(fresh, args.capacity - past)};
}

// Byte offset of (b, g) in a cache.
template <class E, int S> EDGELM_DEVICE i64 cache_offset(const AttentionArgs& args, int b, int g) {
  constexpr int kRow = S * int(sizeof(E)) + (kScaled<E> ? 4 : 0);
  return (i64(b) * args.kv_heads + g) * args.capacity * kRow;
}

// Convert bytes i and j of a word of codes to a pair of M. The conversion is exact.
template <class M, class E> EDGELM_DEVICE u32 upcast(u32 word, int i, int j) {
  static_assert(Same<M, bf16>::value || Same<M, f16>::value, "pairs are of 16-bit numbers");
  const u32 apart = u32(i) | 0x40u | u32(j) << 8 | 0x4000u;  // each byte goes to the low half of a 16-bit number
  if constexpr (Same<E, i8>::value && Same<M, f16>::value) {
    const u32 shifted = permute_bytes(word ^ 0x80808080u, 0x64646464u, apart);  // 1024 + code + 128
    return f16x2_fma(shifted, 0x3c003c00u, 0xe480e480u);
  } else if constexpr (Same<E, i8>::value) {
    // 128 + the lower seven bits, less 128, or less 256 where the sign bit is set: -256 is -128's bits and 0x80.
    const u32 codes = permute_bytes(word, 0, apart);
    return bf16x2_fma(and_or(codes, 0x007f007fu, 0x43004300u), 0x3f803f80u, and_or(codes, 0x00800080u, 0xc300c300u));
  } else if constexpr (Same<M, f16>::value) {
    return e4m3x2_to_f16x2(permute_bytes(word, 0, u32(i) | u32(j) << 4 | 0x4400u));
  } else {
    // The exponent's bias is 120 less: shifted into place and multiplied by 2^120, subnormals are exact too.
    const u32 codes = permute_bytes(word, 0, apart);
    return bf16x2_fma(and_or(codes << 8, 0x80008000u, (codes & 0x007f007fu) << 4), 0x7b807b80u, 0x80008000u);
  }
}

// -- a tile of keys and values in shared memory -----------------------------------------------------------------------

constexpr int kTileKeys = 64;

template <class E, int S> struct Stage {
  static constexpr int kRow = S * int(sizeof(E));  // bytes of a key's codes
  static constexpr int kChunks = kRow / 16;
  static constexpr int kValues = kTileKeys * kRow;  // where the values begin
  static constexpr int kKeyScales = 2 * kValues;
  static constexpr int kValueScales = kKeyScales + 4 * kTileKeys;
  static constexpr int kBytes = kKeyScales + (kScaled<E> ? 8 * kTileKeys : 0);

  // Offset of the 16-byte chunk `chunk` of a row. The XOR swizzle puts rows that are read together on different banks.
  static EDGELM_INLINE int at(int row, int chunk) {
    constexpr int kMask = kChunks < 8 ? kChunks - 1 : 7;
    constexpr int kShare = kChunks < 8 ? 8 / kChunks : 1;  // rows in 128 bytes
    return row * kRow + 16 * (chunk ^ (row / kShare & kMask));
  }
  // Offset of the chunk that is `chunks` after the one at offset `from`. Adding the two chunk numbers must not carry.
  // One instruction: keeping all offsets would cost registers.
  static EDGELM_INLINE int behind(int from, int chunks) { return (from ^ chunks % 8 * 16) + chunks / 8 * 128; }
};

// Copy `count` keys and values of a tile, from `from` on, with cp.async; zeros beyond `end`. Keys from `skip` to `end`
// are left out: another thread stores them. Keys are consecutive positions; `loader` is the number of this thread.
template <class E, int S, int count, int loaders>
EDGELM_DEVICE void load_keys(u8* stage, const u8* keys, const u8* values, int capacity, int tile, int from, int loader,
                             int end, int skip) {
  using Tile = Stage<E, S>;
  constexpr int kUnroll = loaders == kWarp ? 4 : 1;  // a single warp waits longer per load and has registers to spare
  EDGELM_UNROLL_BY(kUnroll)
  for (int i = loader; i < count * Tile::kChunks; i += loaders) {
    const int row = from + i / Tile::kChunks, chunk = i % Tile::kChunks;
    const int position = tile * kTileKeys + row;
    const bool there = position < end;
    if (there && position >= skip) continue;
    const i64 offset = i64(position) * Tile::kRow + 16 * chunk;
    cp_async16(stage + Tile::at(row, chunk), keys + offset, there);
    cp_async16(stage + Tile::kValues + Tile::at(row, chunk), values + offset, there);
  }
  if constexpr (kScaled<E>) {
    for (int i = loader; i < count / 2; i += loaders) {
      const int row = from + i / 2 * 4;
      const int position = tile * kTileKeys + row;
      if (position >= end) continue;
      const u8* scales = (i % 2 ? values : keys) + i64(capacity) * S + 4 * i64(position);
      u8* to = stage + (i % 2 ? Tile::kValueScales : Tile::kKeyScales) + 4 * row;
      if (position + 4 <= skip || skip >= end) {
        cp_async16(to, scales);
      } else {
        for (int k = 0; k < 4 && position + k < skip; ++k) store4(to + 4 * k, load4(scales + 4 * k));
      }
    }
  }
}

// Copy `count` rows of S numbers with cp.async by all threads, zeros from row `rows` on. The layout is that of keys.
template <class M, int S, int count> EDGELM_DEVICE void load_rows(u8* to, const M* from, int rows) {
  constexpr int kChunks = Stage<M, S>::kChunks;
  EDGELM_UNROLL_BY(1)
  for (int i = thread(); i < count * kChunks; i += kAttentionThreads) {
    const int row = i / kChunks, chunk = i % kChunks;
    cp_async16(to + Stage<M, S>::at(row, chunk), from + i64(row) * S + chunk * (16 / int(sizeof(M))), row < rows);
  }
}

// Convert a tile of codes E to a tile of M, by all threads. Columns of keys then have the order of `store_query`, the
// order in which the words of a tile of codes hold them.
template <class M, class E, int S> EDGELM_DEVICE void upcast_tile(u8* to, const u8* from) {
  constexpr int kChunks = Stage<E, S>::kChunks;
  EDGELM_UNROLL_BY(1)
  for (int i = thread(); i < kTileKeys * kChunks; i += kAttentionThreads) {
    const int row = i / kChunks, chunk = i % kChunks;
    EDGELM_UNROLL
    for (int values = 0; values < 2; ++values) {
      const Words4 codes = load16(from + values * Stage<E, S>::kValues + Stage<E, S>::at(row, chunk));
      u8* part = to + values * Stage<M, S>::kValues;
      const u32 words[4] = {codes.x, codes.y, codes.z, codes.w};
      u32 first[4], second[4];
      EDGELM_UNROLL
      for (int k = 0; k < 4; ++k) {
        first[k] = upcast<M, E>(words[k], 0, 1);
        second[k] = upcast<M, E>(words[k], 2, 3);
      }
      if (values == 0) {
        store16(part + Stage<M, S>::at(row, 2 * chunk), {first[0], first[1], first[2], first[3]});
        store16(part + Stage<M, S>::at(row, 2 * chunk + 1), {second[0], second[1], second[2], second[3]});
      } else {
        store16(part + Stage<M, S>::at(row, 2 * chunk), {first[0], second[0], first[1], second[1]});
        store16(part + Stage<M, S>::at(row, 2 * chunk + 1), {first[2], second[2], first[3], second[3]});
      }
    }
  }
}

}  // namespace edgelm
