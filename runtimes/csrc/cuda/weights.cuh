// Storage formats of weights, and their conversion to mma operands. edgelm/bundle/gpu_layout.py describes the layout.
#pragma once

#include "device.cuh"

namespace edgelm {

struct Int4 {};
struct Int8 {};

// columns: of a tile. steps: mma steps of 16 columns per tile. scale_bytes: of a scale, 0 where there is none.
template <class W> struct Format { static constexpr int columns = 16, steps = 1, scale_bytes = 0; };
template <> struct Format<Int4> { static constexpr int columns = 64, steps = 4, scale_bytes = 2; };
template <> struct Format<Int8> { static constexpr int columns = 32, steps = 2, scale_bytes = 2; };
template <> struct Format<e4m3> { static constexpr int columns = 32, steps = 2, scale_bytes = 4; };
template <> struct Format<float> { static constexpr int columns = 8, steps = 0, scale_bytes = 0; };

template <class W> struct Is {
  static constexpr bool integer = Same<W, Int4>::value || Same<W, Int8>::value;
  static constexpr bool scaled = Format<W>::scale_bytes > 0;
};

constexpr int kTileRows = 16;
constexpr int kTileBytes = 512;

// The zero point of symmetric integers.
template <class W> EDGELM_DEVICE int middle() { return Same<W, Int4>::value ? 8 : 128; }
// Four of them.
template <class W> EDGELM_DEVICE u32 middles() { return u32(middle<W>()) * 0x01010101u; }

// -- mma operands: code - zero point, exact ------------- ------------------------------------------------------

template <class A> EDGELM_DEVICE u32 pair_fma(u32 a, u32 b, u32 c) {
  if constexpr (Same<A, bf16>::value) return bf16x2_fma(a, b, c);
  else return f16x2_fma(a, b, c);
}

// The term that `fragment` adds to turn a code into code - zero point, in both halves of a word.
template <class A, class W> EDGELM_DEVICE u32 zero_pair(int zero) {
  // Codes are the last mantissa bits of 128 .. 255 (bfloat16) or 1024 .. 2047 (float16), where the step is 1.
  if constexpr (!Is<W>::integer) return 0;
  else if constexpr (!Same<A, bf16>::value) return permute_bytes(u32(zero), 0xe4, 0x4040);  // -1024 - zero
  else if constexpr (Same<W, Int4>::value) return permute_bytes(u32(zero), 0xc3, 0x4040);   // -128 - zero
  else return float_to_bf16x2(float(128 - zero), float(128 - zero));
}

// Registers a0 .. a3 of mma_16x8x16<A> for columns 16 step .. 16 step + 15 of a tile. `low` and `high` are the
// zero_pairs of rows g and g + 8.
template <class A, class W> EDGELM_DEVICE void fragment(const Words4& tile, int step, u32 low, u32 high, u32 (&a)[4]) {
  constexpr bool brain = Same<A, bf16>::value;
  constexpr u32 one = brain ? 0x3f803f80u : 0x3c003c00u;
  if constexpr (Same<W, A>::value) {
    a[0] = tile.x;
    a[1] = tile.y;
    a[2] = tile.z;
    a[3] = tile.w;
  } else if constexpr (Same<W, Int4>::value) {
    const u32 w = step == 0 ? tile.x : step == 1 ? tile.y : step == 2 ? tile.z : tile.w;
    // Put the code into the lowest mantissa bits of 128 or 1024.
    constexpr u32 magic = brain ? 0x43004300u : 0x64006400u;
    a[0] = pair_fma<A>(and_or(w, 0x000f000fu, magic), one, low);
    a[1] = pair_fma<A>(and_or(w >> 4, 0x000f000fu, magic), one, high);
    a[2] = pair_fma<A>(and_or(w >> 8, 0x000f000fu, magic), one, low);
    a[3] = pair_fma<A>(and_or(w >> 12, 0x000f000fu, magic), one, high);
  } else {
    const u32 first = step ? tile.z : tile.x, second = step ? tile.w : tile.y;  // rows g and g + 8
    EDGELM_UNROLL
    for (int i = 0; i < 4; ++i) {
      const u32 w = i % 2 ? second : first, zero = i % 2 ? high : low;
      if constexpr (Same<W, Int8>::value && !brain) {
        a[i] = pair_fma<A>(permute_bytes(w, 0x64646464u, i < 2 ? 0x4140 : 0x4342), one, zero);
      } else if constexpr (Same<W, Int8>::value) {
        // Seven bits fit into the mantissa of 128. The eighth bit chooses whether 128 or 256 is subtracted: the rest is
        // code - 128.
        const u32 spread = permute_bytes(w, 0, i < 2 ? 0x4140 : 0x4342);
        const u32 rest = and_or(spread, 0x007f007fu, 0x43004300u);
        const u32 taken = (spread & 0x00800080u) ^ 0x43804380u;
        a[i] = pair_fma<A>(pair_fma<A>(taken, 0xbf80bf80u, rest), one, zero);
      } else {
        static_assert(Same<W, e4m3>::value, "W must be e4m3 here");
        if constexpr (brain) {
          // Move sign, exponent and mantissa to bfloat16's positions; its exponent bias is 120 larger.
          const u32 spread = permute_bytes(w, 0, i < 2 ? 0x1404 : 0x3424);
          const u32 bits = and_or(spread, 0x80008000u, (spread >> 4) & 0x07f007f0u);
          a[i] = bf16x2_fma(bits, 0x7b807b80u, 0x80008000u);
        } else {
          a[i] = e4m3x2_to_f16x2(i < 2 ? w & 0xffff : w >> 16);
        }
      }
    }
  }
}

// -- one number at a time ----------------------------------------------------------------------------------------------

// How many numbers a lane holds of each of its two rows.
template <class W> struct Scalars { static constexpr int count = Format<W>::columns / 4; };

// The column within the tile of number i.
template <class W> EDGELM_DEVICE int column_of(int i, int q) {
  if constexpr (Same<W, float>::value) return q + 4 * i;
  else return 16 * (i / 4) + 2 * q + 8 * (i / 2 % 2) + i % 2;
}

EDGELM_DEVICE u32 word_of(const Words4& words, int i) {
  return i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w;
}

// Number i of row g (high = 0) or g + 8 (1): for integers the code, otherwise the value.
template <class W> EDGELM_DEVICE float number_of(const Words4& tile, int high, int i) {
  if constexpr (Same<W, Int4>::value) {
    return float(word_of(tile, i / 4) >> (4 * (i / 2 % 2 * 2 + high + i % 2 * 4)) & 15);
  } else if constexpr (Same<W, Int8>::value) {
    return float(word_of(tile, i / 4 * 2 + high) >> (8 * (i % 4)) & 255);
  } else if constexpr (Same<W, e4m3>::value) {
    return to_float(e4m3{u8(word_of(tile, i / 4 * 2 + high) >> (8 * (i % 4)))});
  } else if constexpr (Same<W, float>::value) {
    return bits_to_float(word_of(tile, i * 2 + high));
  } else {
    return to_float(W{u16(word_of(tile, i / 2 * 2 + high) >> (16 * (i % 2)))});
  }
}

// Return scale `index`.
template <class W> EDGELM_DEVICE float scale_at(const u8* scales, i64 index) {
  if constexpr (Format<W>::scale_bytes == 2) return to_float(reinterpret_cast<const f16*>(scales)[index]);
  else if constexpr (Format<W>::scale_bytes == 4) return reinterpret_cast<const float*>(scales)[index];
  else return 1.f;
}

}  // namespace edgelm
