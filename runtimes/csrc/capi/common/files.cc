#include "capi/common/files.h"

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <system_error>
#include <utility>

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

namespace edgelm::capi {

namespace {

std::string reason(int error) { return std::generic_category().message(error); }

// An open file that is closed on every way out.
class Descriptor {
 public:
  explicit Descriptor(int value) : value_(value) {}
  ~Descriptor() {
    if (value_ >= 0) ::close(value_);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  operator int() const { return value_; }
  int release() { return std::exchange(value_, -1); }

 private:
  int value_;
};

int open_again(const char* path, int flags, int mode = 0) {
  int descriptor;
  do descriptor = ::open(path, flags | O_CLOEXEC, mode);
  while (descriptor < 0 && errno == EINTR);
  return descriptor;
}

// Open a regular file for reading. A pipe, which an open would wait for, is refused.
int open_to_read(const std::string& path, edgelm_code code, std::uint64_t* size) {
  Descriptor file(open_again(path.c_str(), O_RDONLY | O_NONBLOCK));
  struct stat found;
  if (file < 0 || ::fstat(file, &found) != 0) {
    if (errno == ENOENT) fail(code, path, ": is missing");
    fail(code, path, ": cannot be read (", reason(errno), ")");
  }
  if (!S_ISREG(found.st_mode)) {
    fail(code, path, S_ISDIR(found.st_mode) ? ": is a folder, not a file" : ": is not a file");
  }
  *size = static_cast<std::uint64_t>(found.st_size);
  return file.release();
}

std::string folder_of(const std::string& path) {
  const std::size_t slash = path.rfind('/');
  if (slash == std::string::npos) return ".";
  return slash == 0 ? "/" : path.substr(0, slash);
}

// Writes to a file through a buffer; errors name the file that it is to become.
class Writer {
 public:
  Writer(int file, const std::string& path) : file_(file), path_(path) { buffer_.reserve(kBuffer); }

  void write(const void* data, std::size_t size) {
    if (size >= kBuffer) {
      drain();
      put(static_cast<const char*>(data), size);
      return;
    }
    if (buffer_.size() + size > kBuffer) drain();
    buffer_.append(static_cast<const char*>(data), size);
  }

  void finish() {
    drain();
    if (::fsync(file_) != 0 && errno != EINVAL) refuse();  // EINVAL: a file system without it
  }

 private:
  static constexpr std::size_t kBuffer = 256 << 10;

  void drain() {
    put(buffer_.data(), buffer_.size());
    buffer_.clear();
  }

  void put(const char* data, std::size_t size) {
    while (size > 0) {
      const ssize_t written = ::write(file_, data, std::min(size, std::size_t(1) << 30));
      if (written < 0 && errno == EINTR) continue;
      if (written < 0) refuse();
      data += written;
      size -= static_cast<std::size_t>(written);
    }
  }

  [[noreturn]] void refuse() {
    fail(EDGELM_FILE, path_, ": cannot be written (", reason(errno), "); nothing was left behind");
  }

  int file_;
  const std::string& path_;
  std::string buffer_;
};

}  // namespace

std::string read_file(const std::string& path, std::uint64_t limit, edgelm_code code) {
  std::uint64_t size = 0;
  const Descriptor file(open_to_read(path, code, &size));
  std::string text;
  // The size of some system files reads as 0, and a file may grow: the end decides.
  std::size_t filled = 0;
  while (size <= limit) {
    text.resize(std::max<std::size_t>(filled * 2, static_cast<std::size_t>(size) + 1));
    const ssize_t got = ::read(file, text.data() + filled, text.size() - filled);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) fail(code, path, ": cannot be read (", reason(errno), ")");
    filled += static_cast<std::size_t>(got);
    if (filled > limit) break;
    if (got == 0) {
      text.resize(filled);
      return text;
    }
  }
  fail(code, path, ": is larger than ", limit, " bytes, too large for such a file");
}

std::uint64_t file_size(const std::string& path, edgelm_code code) {
  struct stat found;
  if (::stat(path.c_str(), &found) != 0) {
    if (errno == ENOENT) fail(code, path, ": is missing");
    fail(code, path, ": cannot be read (", reason(errno), ")");
  }
  if (!S_ISREG(found.st_mode)) fail(code, path, ": is not a file");
  return static_cast<std::uint64_t>(found.st_size);
}

bool is_file(const std::string& path) {
  struct stat found;
  return ::stat(path.c_str(), &found) == 0 && S_ISREG(found.st_mode);
}

bool is_folder(const std::string& path) {
  struct stat found;
  return ::stat(path.c_str(), &found) == 0 && S_ISDIR(found.st_mode);
}

std::string join(const std::string& folder, const std::string& name) {
  if (folder.empty() || folder.back() == '/') return folder + name;
  return folder + "/" + name;
}

std::string resolved(const std::string& path) {
  char* found = ::realpath(path.c_str(), nullptr);
  if (found == nullptr) return path;
  const std::string result = found;
  std::free(found);
  return result;
}

MappedFile::MappedFile(const std::string& path, edgelm_code code) : path_(path) {
  Descriptor file(open_to_read(path, code, &size_));
  if (size_ > SIZE_MAX) fail(code, path, ": is too large for this system's addresses");
  if (size_ > 0) {
    void* mapped = ::mmap(nullptr, static_cast<std::size_t>(size_), PROT_READ, MAP_SHARED, file, 0);
    if (mapped == MAP_FAILED) fail(code, path, ": cannot be mapped (", reason(errno), ")");
    data_ = static_cast<const unsigned char*>(mapped);
  }
  descriptor_ = file.release();
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) ::munmap(const_cast<unsigned char*>(data_), static_cast<std::size_t>(size_));
  if (descriptor_ >= 0) ::close(descriptor_);
}

void MappedFile::check() const {
  struct stat found;
  if (::fstat(descriptor_, &found) != 0) fail(EDGELM_BUNDLE, path_, ": cannot be read (", reason(errno), ")");
  if (static_cast<std::uint64_t>(found.st_size) < size_) {
    fail(EDGELM_BUNDLE, path_, " had ", size_, " bytes when it was opened and now has ", std::int64_t(found.st_size),
         ": replace files of a bundle in use, never write into them");
  }
}

void write_atomically(const std::string& path,
                      const std::function<void(const std::function<void(const void*, std::size_t)>& write)>& body) {
  const std::string folder = folder_of(path);
  const std::string name = path.substr(path.rfind('/') + 1);
  if (name.empty()) fail(EDGELM_FILE, quoted(path), " is not the name of a file");
  char token[17];
  std::random_device random;
  std::snprintf(token, sizeof token, "%08x%08x", unsigned(random()), unsigned(random()));
  const std::string partial = join(folder, concat(".", name, ".partial-", std::string_view(token)));
  const Descriptor file(open_again(partial.c_str(), O_WRONLY | O_CREAT | O_EXCL, 0666));
  if (file < 0) fail(EDGELM_FILE, path, ": cannot be written (", reason(errno), ")");
  try {
    Writer writer(file, path);
    body([&](const void* data, std::size_t size) { writer.write(data, size); });
    writer.finish();
    if (::rename(partial.c_str(), path.c_str()) != 0) {
      fail(EDGELM_FILE, path, ": cannot be written (", reason(errno), ")");
    }
  } catch (...) {
    ::unlink(partial.c_str());
    throw;
  }
  // The new name is on disk only when the folder is. Some file systems cannot sync folders; the file is complete anyway.
  const Descriptor parent(open_again(folder.c_str(), O_RDONLY));
  if (parent >= 0) (void)::fsync(parent);
}

}  // namespace edgelm::capi
