#include "system/files.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "system/windows_text.h"

namespace edgelm::system {

namespace {

// As on other systems, others may read, replace and remove a file that is open here.
constexpr DWORD kShared = FILE_SHARE_READ | FILE_SHARE_WRITE | FILE_SHARE_DELETE;

HANDLE handle_of(std::intptr_t value) { return reinterpret_cast<HANDLE>(value); }

std::intptr_t open_handle(const std::string& path, DWORD access, DWORD how, DWORD flags) {
  return reinterpret_cast<std::intptr_t>(
      CreateFileW(windows_path(path).c_str(), access, kShared, nullptr, how, flags, nullptr));
}

std::optional<FileStatus> status_from(HANDLE handle) {
  if (GetFileType(handle) != FILE_TYPE_DISK) return FileStatus{FileStatus::kOther, 0};
  BY_HANDLE_FILE_INFORMATION found;
  if (!GetFileInformationByHandle(handle, &found)) return std::nullopt;
  const bool folder = (found.dwFileAttributes & FILE_ATTRIBUTE_DIRECTORY) != 0;
  return FileStatus{folder ? FileStatus::kFolder : FileStatus::kFile,
                    std::uint64_t(found.nFileSizeHigh) << 32 | found.nFileSizeLow};
}

// Closes a handle, and leaves the error of an earlier call in place.
void close_handle(HANDLE handle) {
  const DWORD error = GetLastError();
  CloseHandle(handle);
  SetLastError(error);
}

}  // namespace

Problem last_problem() {
  const DWORD error = GetLastError();
  const bool missing = error == ERROR_FILE_NOT_FOUND || error == ERROR_PATH_NOT_FOUND || error == ERROR_INVALID_NAME ||
                       error == ERROR_BAD_PATHNAME || error == ERROR_BAD_NETPATH || error == ERROR_BAD_NET_NAME;
  return {missing, error_text(error)};
}

std::optional<FileStatus> status_of(const std::string& path) {
  const HANDLE handle = handle_of(open_handle(path, FILE_READ_ATTRIBUTES, OPEN_EXISTING, FILE_FLAG_BACKUP_SEMANTICS));
  if (handle == INVALID_HANDLE_VALUE) return std::nullopt;
  const std::optional<FileStatus> found = status_from(handle);
  close_handle(handle);
  return found;
}

// With backup semantics a folder can be opened, and then be told from a file.
File File::open(const std::string& path) {
  return File(open_handle(path, GENERIC_READ, OPEN_EXISTING, FILE_FLAG_BACKUP_SEMANTICS));
}

File File::create(const std::string& path) {
  return File(open_handle(path, GENERIC_WRITE, CREATE_NEW, FILE_ATTRIBUTE_NORMAL));
}

File& File::operator=(File&& other) noexcept {
  std::swap(handle_, other.handle_);
  return *this;
}

std::optional<FileStatus> File::status() const { return status_from(handle_of(handle_)); }

std::int64_t File::read(void* to, std::size_t bytes) const {
  DWORD got = 0;
  const DWORD most = DWORD(std::min(bytes, std::size_t(1) << 30));
  return ReadFile(handle_of(handle_), to, most, &got, nullptr) ? std::int64_t(got) : -1;
}

std::int64_t File::read_at(void* to, std::size_t bytes, std::uint64_t offset) const {
  OVERLAPPED at = {};
  at.Offset = DWORD(offset);
  at.OffsetHigh = DWORD(offset >> 32);
  DWORD got = 0;
  const DWORD most = DWORD(std::min(bytes, std::size_t(1) << 30));
  if (ReadFile(handle_of(handle_), to, most, &got, &at)) return std::int64_t(got);
  return GetLastError() == ERROR_HANDLE_EOF ? 0 : -1;
}

bool File::write(const void* data, std::size_t bytes) const {
  const char* at = static_cast<const char*>(data);
  while (bytes > 0) {
    DWORD written = 0;
    const DWORD most = DWORD(std::min(bytes, std::size_t(1) << 30));
    if (!WriteFile(handle_of(handle_), at, most, &written, nullptr)) return false;
    at += written;
    bytes -= written;
  }
  return true;
}

bool File::sync() const {
  return FlushFileBuffers(handle_of(handle_)) || GetLastError() == ERROR_INVALID_FUNCTION;  // a file system without it
}

// The view keeps the file's contents; the handle of the mapping is not needed any more.
const unsigned char* File::map(std::uint64_t bytes) const {
  const HANDLE mapping = CreateFileMappingW(handle_of(handle_), nullptr, PAGE_READONLY, DWORD(bytes >> 32),
                                            DWORD(bytes), nullptr);
  if (mapping == nullptr) return nullptr;
  void* mapped = MapViewOfFile(mapping, FILE_MAP_READ, 0, 0, std::size_t(bytes));
  close_handle(mapping);
  return static_cast<const unsigned char*>(mapped);
}

void File::close() {
  if (is_open()) close_handle(handle_of(handle_));
  handle_ = kClosed;
}

void unmap(const unsigned char* data, std::uint64_t) { UnmapViewOfFile(data); }

bool replace_file(const std::string& from, const std::string& to) {
  return MoveFileExW(windows_path(from).c_str(), windows_path(to).c_str(),
                     MOVEFILE_REPLACE_EXISTING | MOVEFILE_WRITE_THROUGH);
}

void remove_file(const std::string& path) { DeleteFileW(windows_path(path).c_str()); }

void sync_folder(const std::string&) {}  // MOVEFILE_WRITE_THROUGH has waited

std::string resolved_path(const std::string& path) {
  const std::intptr_t handle = open_handle(path, 0, OPEN_EXISTING, FILE_FLAG_BACKUP_SEMANTICS);
  if (handle_of(handle) == INVALID_HANDLE_VALUE) return "";
  std::wstring found(1 << 15, L'\0');
  const DWORD size = GetFinalPathNameByHandleW(handle_of(handle), found.data(), DWORD(found.size()), 0);
  CloseHandle(handle_of(handle));
  if (size == 0 || size >= found.size()) return "";
  found.resize(size);
  std::string text = to_utf8(found);
  if (text.compare(0, 8, "\\\\?\\UNC\\") == 0) text.replace(0, 8, "\\\\");
  else if (text.compare(0, 4, "\\\\?\\") == 0) text.erase(0, 4);
  std::replace(text.begin(), text.end(), '\\', '/');
  return text;
}

std::size_t last_separator(const std::string& path) { return path.find_last_of("/\\"); }

Stream open_stream(const std::string& path) { return Stream(_wfopen(windows_path(path).c_str(), L"rbN")); }

bool seek(std::FILE* file, std::uint64_t offset) { return _fseeki64(file, std::int64_t(offset), SEEK_SET) == 0; }

}  // namespace edgelm::system
