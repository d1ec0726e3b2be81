#include "capi/common/files.h"

#include <algorithm>
#include <cstdio>
#include <random>

namespace edgelm::capi {

namespace {

using system::File;
using system::FileStatus;

std::string reason() { return system::last_problem().text; }

// Refuse a file of which the last call said nothing.
[[noreturn]] void fail_unread(const std::string& path, edgelm_code code) {
  const system::Problem problem = system::last_problem();
  if (problem.missing) fail(code, path, ": is missing");
  fail(code, path, ": cannot be read (", problem.text, ")");
}

// Open a regular file for reading. A pipe, which an open would wait for, is refused.
File open_to_read(const std::string& path, edgelm_code code, std::uint64_t* size) {
  File file = File::open(path);
  const std::optional<FileStatus> found = file.is_open() ? file.status() : std::nullopt;
  if (!found) fail_unread(path, code);
  if (found->kind != FileStatus::kFile) {
    fail(code, path, found->kind == FileStatus::kFolder ? ": is a folder, not a file" : ": is not a file");
  }
  *size = found->size;
  return file;
}

// Writes to a file through a buffer; errors name the file that it is to become.
class Writer {
 public:
  Writer(const File& file, const std::string& path) : file_(file), path_(path) { buffer_.reserve(kBuffer); }

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
    if (!file_.sync()) refuse();
  }

 private:
  static constexpr std::size_t kBuffer = 256 << 10;

  void drain() {
    put(buffer_.data(), buffer_.size());
    buffer_.clear();
  }

  void put(const char* data, std::size_t size) {
    if (!file_.write(data, size)) refuse();
  }

  [[noreturn]] void refuse() {
    fail(EDGELM_FILE, path_, ": cannot be written (", reason(), "); nothing was left behind");
  }

  const File& file_;
  const std::string& path_;
  std::string buffer_;
};

}  // namespace

std::string read_file(const std::string& path, std::uint64_t limit, edgelm_code code) {
  std::uint64_t size = 0;
  const File file = open_to_read(path, code, &size);
  std::string text;
  // The size of some system files reads as 0, and a file may grow: the end decides.
  std::size_t filled = 0;
  while (size <= limit) {
    text.resize(std::max<std::size_t>(filled * 2, static_cast<std::size_t>(size) + 1));
    const std::int64_t got = file.read(text.data() + filled, text.size() - filled);
    if (got < 0) fail(code, path, ": cannot be read (", reason(), ")");
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
  const std::optional<FileStatus> found = system::status_of(path);
  if (!found) fail_unread(path, code);
  if (found->kind != FileStatus::kFile) fail(code, path, ": is not a file");
  return found->size;
}

bool is_file(const std::string& path) {
  const std::optional<FileStatus> found = system::status_of(path);
  return found && found->kind == FileStatus::kFile;
}

bool is_folder(const std::string& path) {
  const std::optional<FileStatus> found = system::status_of(path);
  return found && found->kind == FileStatus::kFolder;
}

std::string join(const std::string& folder, const std::string& name) {
  if (folder.empty() || system::last_separator(folder) == folder.size() - 1) return folder + name;
  return folder + "/" + name;
}

std::string parent(const std::string& path) {
  const std::size_t separator = system::last_separator(path);
  if (separator == std::string::npos) return ".";
  return path.substr(0, std::max<std::size_t>(separator, 1));
}

std::string resolved(const std::string& path) {
  const std::string found = system::resolved_path(path);
  return found.empty() ? path : found;
}

MappedFile::MappedFile(const std::string& path, edgelm_code code)
    : path_(path), file_(open_to_read(path, code, &size_)) {
  if (size_ > SIZE_MAX) fail(code, path, ": is too large for this system's addresses");
  if (size_ > 0) data_ = file_.map(size_);
  if (size_ > 0 && data_ == nullptr) fail(code, path, ": cannot be mapped (", reason(), ")");
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) system::unmap(data_, size_);
}

void MappedFile::check() const {
  const std::optional<FileStatus> found = file_.status();
  if (!found) fail(EDGELM_BUNDLE, path_, ": cannot be read (", reason(), ")");
  if (found->size < size_) {
    fail(EDGELM_BUNDLE, path_, " had ", size_, " bytes when it was opened and now has ", found->size,
         ": replace files of a bundle in use, never write into them");
  }
}

void write_atomically(const std::string& path,
                      const std::function<void(const std::function<void(const void*, std::size_t)>& write)>& body) {
  const std::string folder = parent(path);
  const std::string name = path.substr(system::last_separator(path) + 1);
  if (name.empty()) fail(EDGELM_FILE, quoted(path), " is not the name of a file");
  char token[17];
  std::random_device random;
  std::snprintf(token, sizeof token, "%08x%08x", unsigned(random()), unsigned(random()));
  const std::string partial = join(folder, concat(".", name, ".partial-", std::string_view(token)));
  File file = File::create(partial);
  if (!file.is_open()) fail(EDGELM_FILE, path, ": cannot be written (", reason(), ")");
  try {
    Writer writer(file, path);
    body([&](const void* data, std::size_t size) { writer.write(data, size); });
    writer.finish();
    file.close();  // Windows does not rename a file that is open for writing
    if (!system::replace_file(partial, path)) fail(EDGELM_FILE, path, ": cannot be written (", reason(), ")");
  } catch (...) {
    file.close();
    system::remove_file(partial);
    throw;
  }
  system::sync_folder(folder);  // the new name is on disk only when the folder is
}

}  // namespace edgelm::capi
