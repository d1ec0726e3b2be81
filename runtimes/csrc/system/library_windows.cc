#include "system/library.h"

#include <cstdlib>

#include "system/windows_text.h"

namespace edgelm::system {

void* open_library(const std::string& path, std::string* why) {
  // With a path, what the library itself needs is looked for beside it. Without one it is looked for beside the program
  // and in the system's folder: not in the current folder, where anybody may have put one.
  const bool named = path.find_first_of("/\\") != std::string::npos;
  const std::wstring file = named ? absolute_path(windows_path(path)) : to_utf16(path);
  HMODULE library = LoadLibraryExW(file.c_str(), nullptr,
                                   named ? LOAD_WITH_ALTERED_SEARCH_PATH : LOAD_LIBRARY_SEARCH_DEFAULT_DIRS);
  if (library == nullptr) *why = error_text(GetLastError());
  return reinterpret_cast<void*>(library);
}

void* symbol(void* library, const char* name) {
  return reinterpret_cast<void*>(GetProcAddress(static_cast<HMODULE>(library), name));
}

void* library_of(const void* address) {
  HMODULE module = nullptr;
  GetModuleHandleExW(GET_MODULE_HANDLE_EX_FLAG_FROM_ADDRESS | GET_MODULE_HANDLE_EX_FLAG_UNCHANGED_REFCOUNT,
                     static_cast<LPCWSTR>(address), &module);
  return reinterpret_cast<void*>(module);
}

std::string file_of(const void* address) {
  HMODULE module = static_cast<HMODULE>(library_of(address));
  if (module == nullptr) return "";
  std::wstring path(1 << 15, L'\0');
  const DWORD size = GetModuleFileNameW(module, path.data(), DWORD(path.size()));
  return size == path.size() ? "" : to_utf8({path.data(), size});
}

std::optional<std::string> variable(const char* name) {
  const std::wstring wide = to_utf16(name);
  std::wstring value(1 << 15, L'\0');  // the most that a variable can have
  SetLastError(ERROR_SUCCESS);
  const DWORD size = GetEnvironmentVariableW(wide.c_str(), value.data(), DWORD(value.size()));
  if (size >= value.size() || (size == 0 && GetLastError() != ERROR_SUCCESS)) return std::nullopt;
  return to_utf8({value.data(), size});
}

// The C library changes the process's variables and its own copy, which other libraries may read.
void set_variable(const char* name, const std::optional<std::string>& value) {
  _wputenv_s(to_utf16(name).c_str(), value ? to_utf16(*value).c_str() : L"");
}

}  // namespace edgelm::system
