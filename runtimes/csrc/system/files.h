// The file operations that capi/common/files.cc and the executor need. Paths are UTF-8 on every system. Nothing throws:
// after a failure, last_problem() says why.
#ifndef EDGELM_SYSTEM_FILES_H_
#define EDGELM_SYSTEM_FILES_H_

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <optional>
#include <string>

namespace edgelm::system {

struct FileStatus {
  enum Kind { kFile, kFolder, kOther };
  Kind kind;
  std::uint64_t size;
};

// Why this thread's last call here failed.
struct Problem {
  bool missing;  // there is no such file
  std::string text;
};
Problem last_problem();

std::optional<FileStatus> status_of(const std::string& path);

// An open file, closed on every way out.
class File {
 public:
  static File open(const std::string& path);    // for reading; does not wait for the other end of a pipe
  static File create(const std::string& path);  // for writing; fails if it exists
  File() = default;
  File(File&& other) noexcept : handle_(other.handle_) { other.handle_ = kClosed; }
  File& operator=(File&& other) noexcept;
  ~File() { close(); }

  bool is_open() const { return handle_ != kClosed; }
  std::optional<FileStatus> status() const;
  std::int64_t read(void* to, std::size_t bytes) const;  // the bytes read, 0 at the end, -1 after a failure
  std::int64_t read_at(void* to, std::size_t bytes, std::uint64_t offset) const;  // the same from `offset` on
  bool write(const void* data, std::size_t bytes) const;
  bool sync() const;  // wait until the contents are on disk, where the file system can
  // Map the first `bytes` > 0 bytes for reading; nullptr after a failure. Replacing the file does not affect them.
  const unsigned char* map(std::uint64_t bytes) const;
  void close();

 private:
  static constexpr std::intptr_t kClosed = -1;
  explicit File(std::intptr_t handle) : handle_(handle) {}
  std::intptr_t handle_ = kClosed;
};

void unmap(const unsigned char* data, std::uint64_t bytes);

bool replace_file(const std::string& from, const std::string& to);  // atomically
void remove_file(const std::string& path);
void sync_folder(const std::string& path);

// The path with links resolved, with slashes; empty if there is no such file.
std::string resolved_path(const std::string& path);

// The last separator of folders in a path, npos if there is none.
std::size_t last_separator(const std::string& path);

// A file for reading with <cstdio>; nullptr if it cannot be opened, with errno.
struct CloseStream {
  void operator()(std::FILE* file) const { std::fclose(file); }
};
using Stream = std::unique_ptr<std::FILE, CloseStream>;
Stream open_stream(const std::string& path);
bool seek(std::FILE* file, std::uint64_t offset);

}  // namespace edgelm::system

#endif  // EDGELM_SYSTEM_FILES_H_
