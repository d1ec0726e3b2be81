// Decompression of DEFLATE (RFC 1951), for data that may be damaged or hostile.
#pragma once

#include <cstddef>
#include <stdexcept>
#include <vector>

namespace edgelm::capi {

// The bytes of an archive are not what its format asks for.
class Damaged : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// The decompressed bytes of the raw stream at the start of `data`. Throws Damaged, also if there are more than `limit`
// bytes, which is what is allocated.
std::vector<unsigned char> inflate(const unsigned char* data, std::size_t size, std::size_t limit);

}  // namespace edgelm::capi
