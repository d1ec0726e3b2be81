#include "system/windows_text.h"

#include <algorithm>

namespace edgelm::system {

namespace {

constexpr std::size_t kLongPath = 240;  // below the limits of files (260) and folders (248)

}  // namespace

std::wstring to_utf16(std::string_view text) {
  const int size = MultiByteToWideChar(CP_UTF8, 0, text.data(), int(text.size()), nullptr, 0);
  std::wstring found(std::size_t(size), L'\0');
  MultiByteToWideChar(CP_UTF8, 0, text.data(), int(text.size()), found.data(), size);
  return found;
}

std::string to_utf8(std::wstring_view text) {
  const int size = WideCharToMultiByte(CP_UTF8, 0, text.data(), int(text.size()), nullptr, 0, nullptr, nullptr);
  std::string found(std::size_t(size), '\0');
  WideCharToMultiByte(CP_UTF8, 0, text.data(), int(text.size()), found.data(), size, nullptr, nullptr);
  return found;
}

std::wstring absolute_path(const std::wstring& path) {
  std::wstring found(path.size() + MAX_PATH, L'\0');
  DWORD size = GetFullPathNameW(path.c_str(), DWORD(found.size()), found.data(), nullptr);
  if (size >= found.size()) {  // then it is the size needed
    found.resize(size);
    size = GetFullPathNameW(path.c_str(), size, found.data(), nullptr);
  }
  if (size == 0 || size >= found.size()) return path;
  found.resize(size);
  return found;
}

std::wstring windows_path(std::string_view path) {
  std::wstring found = to_utf16(path);
  if (found.find(L'\0') != std::wstring::npos) return L"?";  // no file has such a name
  std::replace(found.begin(), found.end(), L'/', L'\\');
  if (found.compare(0, 4, L"\\\\?\\") == 0) return found;
  // A relative path counts from the current folder, which may be deep itself.
  const std::wstring whole = absolute_path(found);
  if (whole.size() < kLongPath) return found;
  if (whole.compare(0, 4, L"\\\\.\\") == 0) return found;
  if (whole.compare(0, 2, L"\\\\") == 0) return L"\\\\?\\UNC" + whole.substr(1);
  return L"\\\\?\\" + whole;
}

std::string error_text(DWORD error) {
  wchar_t text[512];
  const DWORD flags = FORMAT_MESSAGE_FROM_SYSTEM | FORMAT_MESSAGE_IGNORE_INSERTS | FORMAT_MESSAGE_MAX_WIDTH_MASK;
  const DWORD size = FormatMessageW(flags, nullptr, error, 0, text, 512, nullptr);
  std::string found = to_utf8({text, size});
  while (!found.empty() && (found.back() == ' ' || found.back() == '.')) found.pop_back();
  const std::string number = "error " + std::to_string(error) + " of Windows";
  return found.empty() ? number : found + ", " + number;
}

}  // namespace edgelm::system
