// Archives of arrays as numpy.savez writes them: a zip file of stored or deflated .npy files.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "capi/parity/pack/inflate.h"

namespace edgelm::capi {

// A zip file in memory. Without encryption, ZIP64 and multiple disks. Every read checks the CRC-32.
class ZipArchive {
 public:
  // `data` must outlive the archive. Throws Damaged.
  ZipArchive(const unsigned char* data, std::size_t size);

  bool has(const std::string& name) const { return entries_.count(name) != 0; }
  // The contents of a file of at most `limit` bytes. Throws Damaged.
  std::vector<unsigned char> read(const std::string& name, std::size_t limit) const;

 private:
  struct Entry {
    unsigned flags, method;
    std::uint32_t crc32, packed, unpacked, offset;
  };

  const unsigned char* data_;
  std::size_t size_;
  std::map<std::string, Entry> entries_;
};

// The header of a .npy file of format 1.0, 2.0 or 3.0.
struct NpyHeader {
  std::string type;  // such as "<f4"
  bool by_columns;
  std::vector<std::int64_t> shape;
  std::size_t size;  // of the header: the data follows
};

constexpr std::size_t kMostNpyHeader = 10000 + 12;  // as numpy's limit

// Throws Damaged.
NpyHeader read_npy_header(const unsigned char* data, std::size_t size);

}  // namespace edgelm::capi
