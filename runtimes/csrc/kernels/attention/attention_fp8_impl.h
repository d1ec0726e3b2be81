// Attention over caches of FP8 E4M3: a block's keys and values are converted to float32, which is exact, and processed
// as a float32 cache. The result has the same bits as with a float32 cache of the rounded keys and values.
#ifndef EDGELM_KERNELS_ATTENTION_FP8_IMPL_H_
#define EDGELM_KERNELS_ATTENTION_FP8_IMPL_H_

#include "attention_float_impl.h"

namespace edgelm {
namespace {

// Convert a tile of keys to float32 [head_dim, 16 tokens].
inline void UpcastFp8Keys(const HeadCache& cache, int64_t tile, float* to) {
  const int64_t n = cache.Tokens(tile), dim = cache.head_dim;
  const uint8_t* codes = cache.Tile(tile);
  uint16_t some[16] = {};
  std::memcpy(some, codes + n * dim, 2 * n);
  const F32 scales = LoadBFloat16(some);
  if (n < 16) {
    uint8_t* whole = reinterpret_cast<uint8_t*>(to);
    UpcastKeys<uint8_t>(codes, n, dim, whole);
    codes = whole;
  }
  // From the last dimension to the first: the source is at the start of the destination.
  for (int64_t d = dim; d-- > 0;) Store(to + 16 * d, Mul(LoadFp8(codes + 16 * d), scales));
}

// Convert the first `count` tokens of a tile of values to float32 [count, width].
inline void UpcastFp8Values(const HeadCache& cache, int64_t tile, int64_t count, int64_t width, float* to) {
  const int64_t n = cache.Tokens(tile), dim = cache.head_dim;
  const uint8_t* codes = cache.Tile(tile);
  for (int64_t t = 0; t < count; ++t, to += width) {
    uint16_t bits;
    std::memcpy(&bits, codes + n * dim + 2 * t, 2);
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float scale;
    std::memcpy(&scale, &wide, 4);
    for (int64_t i = 0; i < dim; i += 16) {
      uint8_t part[16] = {};
      const uint8_t* p = codes + t * dim + i;
      if (dim - i < 16) {
        std::memcpy(part, p, dim - i);
        p = part;
      }
      Store(to + i, Mul(LoadFp8(p), Splat(scale)));
    }
  }
}

void AttendFp8(const Unit& u, int64_t from, int64_t begin, int64_t count) {
  const Attention& call = *u.call;
  const HeadCache keys = Cache(call, call.key, u.head), values = Cache(call, call.value, u.head);
  const int64_t width = u.at.width, first = begin / kCacheTile;
  float* wide_keys = reinterpret_cast<float*>(u.keys);
  float* wide_values = reinterpret_cast<float*>(u.values);
  // The prefetch pointers get the converted block: there is nothing to prefetch, as it is in the CPU's cache already.
  FloatView<float> view = {{}, wide_values, width, u.values, u.keys};
  for (int64_t i = 0; 16 * i < count; ++i) {
    const int64_t some = count - 16 * i < 16 ? count - 16 * i : 16;
    UpcastFp8Keys(keys, first + i, wide_keys + 16 * width * i);
    UpcastFp8Values(values, first + i, some, width, wide_values + 16 * width * i);
    view.keys[i] = reinterpret_cast<const uint8_t*>(wide_keys + 16 * width * i);
  }
  call.split_kv() ? FloatRows<float, true>(u, from, begin, count, view)
                  : FloatRows<float, false>(u, from, begin, count, view);
}

}  // namespace
}  // namespace edgelm

#endif  // EDGELM_KERNELS_ATTENTION_FP8_IMPL_H_
