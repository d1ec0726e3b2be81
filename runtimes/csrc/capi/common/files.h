// Files: read whole, mapped, hashed, and written atomically.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>

#include "capi/common/error.h"
#include "system/files.h"

namespace edgelm::capi {

// The bytes of a file of at most `limit` bytes. Throws Error(code) with the path and the system's reason.
std::string read_file(const std::string& path, std::uint64_t limit, edgelm_code code);

// The size in bytes; throws Error(code) if there is no regular file.
std::uint64_t file_size(const std::string& path, edgelm_code code);
bool is_file(const std::string& path);
bool is_folder(const std::string& path);
std::string join(const std::string& folder, const std::string& name);
std::string parent(const std::string& path);
// The path with links resolved; the path itself if it cannot be.
std::string resolved(const std::string& path);

// A file mapped for reading, kept open: replacing it does not affect the mapping.
class MappedFile {
 public:
  MappedFile(const std::string& path, edgelm_code code);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  const unsigned char* data() const { return data_; }
  std::uint64_t size() const { return size_; }
  // Throws Error(EDGELM_BUNDLE) if the file is shorter now than when it was opened: reading a lost page would kill the
  // process. Takes about a microsecond.
  void check() const;

 private:
  std::string path_;
  std::uint64_t size_ = 0;
  system::File file_;
  const unsigned char* data_ = nullptr;
};

// Write a file: `body` writes to a temporary file beside it, which replaces `path` when all is on disk. On failure `path`
// is unchanged and the temporary file is gone.
void write_atomically(const std::string& path,
                      const std::function<void(const std::function<void(const void*, std::size_t)>& write)>& body);

class Sha256 {
 public:
  void update(const void* data, std::size_t size);
  void update(std::string_view text) { update(text.data(), text.size()); }
  std::string hex();  // ends the hash

 private:
  std::uint32_t state_[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                             0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  unsigned char block_[64];
  std::uint64_t size_ = 0;
};

// CRC-32 of zlib. `crc` continues an earlier one.
std::uint32_t crc32(const void* data, std::size_t size, std::uint32_t crc = 0);

}  // namespace edgelm::capi
