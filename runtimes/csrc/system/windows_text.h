// Text for calls of Windows, which takes UTF-16.
#ifndef EDGELM_SYSTEM_WINDOWS_TEXT_H_
#define EDGELM_SYSTEM_WINDOWS_TEXT_H_

#ifndef NOMINMAX
#define NOMINMAX
#endif
#ifndef WIN32_LEAN_AND_MEAN
#define WIN32_LEAN_AND_MEAN
#endif
#include <windows.h>

#include <string>
#include <string_view>

namespace edgelm::system {

std::wstring to_utf16(std::string_view text);
std::string to_utf8(std::wstring_view text);

// The absolute path of one with backslashes.
std::wstring absolute_path(const std::wstring& path);

// A path for Windows: with backslashes; absolute and with the prefix \\?\ where it would be too long otherwise.
std::wstring windows_path(std::string_view path);

// The text of an error of Windows, in the language of the user, and its number.
std::string error_text(DWORD error);

}  // namespace edgelm::system

#endif  // EDGELM_SYSTEM_WINDOWS_TEXT_H_
