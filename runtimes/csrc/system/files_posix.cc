#include "system/files.h"

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <system_error>
#include <utility>

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

namespace edgelm::system {

namespace {

int open_again(const std::string& path, int flags, int mode = 0) {
  int descriptor;
  do descriptor = ::open(path.c_str(), flags | O_CLOEXEC, mode);
  while (descriptor < 0 && errno == EINTR);
  return descriptor;
}

FileStatus status_from(const struct stat& found) {
  const auto kind = S_ISREG(found.st_mode)   ? FileStatus::kFile
                    : S_ISDIR(found.st_mode) ? FileStatus::kFolder
                                             : FileStatus::kOther;
  return {kind, static_cast<std::uint64_t>(found.st_size)};
}

}  // namespace

Problem last_problem() { return {errno == ENOENT, std::generic_category().message(errno)}; }

std::optional<FileStatus> status_of(const std::string& path) {
  struct stat found;
  if (::stat(path.c_str(), &found) != 0) return std::nullopt;
  return status_from(found);
}

File File::open(const std::string& path) { return File(open_again(path, O_RDONLY | O_NONBLOCK)); }

File File::create(const std::string& path) { return File(open_again(path, O_WRONLY | O_CREAT | O_EXCL, 0666)); }

File& File::operator=(File&& other) noexcept {
  std::swap(handle_, other.handle_);
  return *this;
}

std::optional<FileStatus> File::status() const {
  struct stat found;
  if (::fstat(int(handle_), &found) != 0) return std::nullopt;
  return status_from(found);
}

std::int64_t File::read(void* to, std::size_t bytes) const {
  ssize_t got;
  do got = ::read(int(handle_), to, bytes);
  while (got < 0 && errno == EINTR);
  return got;
}

std::int64_t File::read_at(void* to, std::size_t bytes, std::uint64_t offset) const {
  ssize_t got;
  do got = ::pread(int(handle_), to, bytes, off_t(offset));
  while (got < 0 && errno == EINTR);
  return got;
}

bool File::write(const void* data, std::size_t bytes) const {
  const char* at = static_cast<const char*>(data);
  while (bytes > 0) {
    const ssize_t written = ::write(int(handle_), at, std::min(bytes, std::size_t(1) << 30));
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) return false;
    at += written;
    bytes -= static_cast<std::size_t>(written);
  }
  return true;
}

bool File::sync() const { return ::fsync(int(handle_)) == 0 || errno == EINVAL; }  // EINVAL: a file system without it

const unsigned char* File::map(std::uint64_t bytes) const {
  void* mapped = ::mmap(nullptr, static_cast<std::size_t>(bytes), PROT_READ, MAP_SHARED, int(handle_), 0);
  return mapped == MAP_FAILED ? nullptr : static_cast<const unsigned char*>(mapped);
}

void File::close() {
  if (is_open()) ::close(int(handle_));
  handle_ = kClosed;
}

void unmap(const unsigned char* data, std::uint64_t bytes) {
  ::munmap(const_cast<unsigned char*>(data), static_cast<std::size_t>(bytes));
}

bool replace_file(const std::string& from, const std::string& to) { return ::rename(from.c_str(), to.c_str()) == 0; }

void remove_file(const std::string& path) { ::unlink(path.c_str()); }

// Some file systems cannot sync folders.
void sync_folder(const std::string& path) {
  const int folder = open_again(path, O_RDONLY);
  if (folder < 0) return;
  (void)::fsync(folder);
  ::close(folder);
}

std::string resolved_path(const std::string& path) {
  char* found = ::realpath(path.c_str(), nullptr);
  if (found == nullptr) return "";
  const std::string result = found;
  std::free(found);
  return result;
}

std::size_t last_separator(const std::string& path) { return path.rfind('/'); }

Stream open_stream(const std::string& path) { return Stream(std::fopen(path.c_str(), "rb")); }

bool seek(std::FILE* file, std::uint64_t offset) { return ::fseeko(file, off_t(offset), SEEK_SET) == 0; }

}  // namespace edgelm::system
