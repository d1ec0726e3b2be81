// SHA-256 (FIPS 180-4) and CRC-32 (ISO 3309, as zlib).
#include <algorithm>
#include <array>
#include <cstring>

#include "capi/common/files.h"
#include "capi/common/sha256_blocks.h"

namespace edgelm::capi {

namespace {

// tables[k][b]: the remainder of byte b followed by k zero bytes, so that eight bytes are taken at a time.
using CrcTables = std::array<std::array<std::uint32_t, 256>, 8>;

CrcTables crc_tables() {
  CrcTables tables;
  for (std::uint32_t byte = 0; byte < 256; ++byte) {
    std::uint32_t value = byte;
    for (int bit = 0; bit < 8; ++bit) value = value >> 1 ^ (value & 1 ? 0xedb88320u : 0u);
    tables[0][byte] = value;
  }
  for (std::size_t k = 1; k < 8; ++k) {
    for (std::size_t byte = 0; byte < 256; ++byte) {
      const std::uint32_t before = tables[k - 1][byte];
      tables[k][byte] = before >> 8 ^ tables[0][before & 255];
    }
  }
  return tables;
}

}  // namespace

void Sha256::update(const void* data, std::size_t size) {
  const unsigned char* bytes = static_cast<const unsigned char*>(data);
  std::size_t filled = size_ % 64;
  size_ += size;
  if (filled > 0) {
    const std::size_t taken = std::min(size, 64 - filled);
    std::memcpy(block_ + filled, bytes, taken);
    if (filled + taken < 64) return;
    sha256_blocks(state_, block_, 1);
    bytes += taken;
    size -= taken;
  }
  sha256_blocks(state_, bytes, size / 64);
  if (size % 64 > 0) std::memcpy(block_, bytes + size / 64 * 64, size % 64);
}

std::string Sha256::hex() {
  const std::uint64_t bits = size_ * 8;
  const unsigned char one = 0x80, zero = 0;
  update(&one, 1);
  while (size_ % 64 != 56) update(&zero, 1);
  unsigned char length[8];
  for (int i = 0; i < 8; ++i) length[i] = static_cast<unsigned char>(bits >> (56 - 8 * i));
  update(length, sizeof length);
  std::string text;
  for (const std::uint32_t word : state_) {
    for (int shift = 28; shift >= 0; shift -= 4) text += "0123456789abcdef"[word >> shift & 15];
  }
  return text;
}

std::uint32_t crc32(const void* data, std::size_t size, std::uint32_t crc) {
  static const CrcTables tables = crc_tables();
  const unsigned char* bytes = static_cast<const unsigned char*>(data);
  crc = ~crc;
  for (; size >= 8; bytes += 8, size -= 8) {
    std::uint32_t next = 0;
    for (int k = 0; k < 8; ++k) {
      const unsigned char low = k < 4 ? static_cast<unsigned char>(crc >> (8 * k)) : 0;
      next ^= tables[7 - k][bytes[k] ^ low];
    }
    crc = next;
  }
  for (; size > 0; ++bytes, --size) crc = crc >> 8 ^ tables[0][(crc ^ *bytes) & 255];
  return ~crc;
}

}  // namespace edgelm::capi
