#include "capi/runtime/onnxruntime/cache_rows.h"

#include <algorithm>
#include <cstring>

#include "kernels/attention/attention.h"

namespace edgelm::capi {
namespace {

// A tile of n tokens.
struct Tile {
  std::int64_t head_dim, n, element_bytes, scale_bytes;
  bool keys, by_four;

  // Byte of element d of token `slot`.
  std::int64_t element(std::int64_t d, std::int64_t slot) const {
    if (by_four && keys) {
      const std::int64_t four = d / 4 * 4, width = std::min<std::int64_t>(head_dim - four, 4);
      return n * four + width * slot + d - four;
    }
    if (by_four) {
      const std::int64_t four = slot / 4 * 4, width = std::min<std::int64_t>(n - four, 4);
      return head_dim * four + width * d + slot - four;
    }
    return element_bytes * (keys ? d * n + slot : slot * head_dim + d);
  }
  std::int64_t scale(std::int64_t slot) const { return n * head_dim + scale_bytes * slot; }
};

// Call copy(byte in the head, byte in the rows, bytes) for all parts of the first `length` tokens.
template <typename Copy>
void for_parts(const CacheRows& cache, bool keys, std::int64_t length, const Copy& copy) {
  const bool int8 = cache.kv == "int8", fp8 = cache.kv == "fp8";
  Tile tile{cache.head_dim, 0, int8 || fp8 ? 1 : cache.row_bytes / cache.head_dim, int8 ? 4 : fp8 ? 2 : 0, keys, int8};
  for (std::int64_t token = 0; token < length; ++token) {
    const std::int64_t slot = token % kCacheTile, first = token - slot;
    const std::int64_t at = first * cache.row_bytes, row = token * cache.row_bytes;
    tile.n = std::min<std::int64_t>(cache.capacity - first, kCacheTile);
    for (std::int64_t d = 0; d < cache.head_dim; ++d) {
      copy(at + tile.element(d, slot), row + d * tile.element_bytes, tile.element_bytes);
    }
    if (tile.scale_bytes > 0) copy(at + tile.scale(slot), row + cache.head_dim, tile.scale_bytes);
  }
}

}  // namespace

void CacheRows::pack(bool keys, const unsigned char* head, std::int64_t length, unsigned char* rows) const {
  for_parts(*this, keys, length, [=](std::int64_t in_head, std::int64_t in_rows, std::int64_t bytes) {
    std::memcpy(rows + in_rows, head + in_head, std::size_t(bytes));
  });
}

void CacheRows::unpack(bool keys, unsigned char* head, std::int64_t length, const unsigned char* rows) const {
  for_parts(*this, keys, length, [=](std::int64_t in_head, std::int64_t in_rows, std::int64_t bytes) {
    std::memcpy(head + in_head, rows + in_rows, std::size_t(bytes));
  });
}

}  // namespace edgelm::capi
