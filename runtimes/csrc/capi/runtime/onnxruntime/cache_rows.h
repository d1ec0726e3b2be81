// Rows of tokens in a native KV cache: the order of its bytes is that of kernels/attention/attention_cache_impl.h, in
// tiles of 16 tokens, of which the last of a cache is smaller. A saved cache has row after row, so that it can be read
// into a cache of another capacity.
#pragma once

#include <cstdint>
#include <string>

namespace edgelm::capi {

struct CacheRows {
  std::string kv;
  std::int64_t head_dim, row_bytes, capacity;

  // Copy the first `length` tokens of one head's keys or values to `rows` [length, row_bytes].
  void pack(bool keys, const unsigned char* head, std::int64_t length, unsigned char* rows) const;
  // The reverse.
  void unpack(bool keys, unsigned char* head, std::int64_t length, const unsigned char* rows) const;
};

}  // namespace edgelm::capi
