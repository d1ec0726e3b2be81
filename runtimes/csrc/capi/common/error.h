// Failures inside the library: an exception with a code, which the C functions turn into an edgelm_error.
#pragma once

#include <stdexcept>
#include <string>
#include <string_view>

#include "capi/edgelm.h"

namespace edgelm::capi {

class Error : public std::runtime_error {
 public:
  Error(edgelm_code code, const std::string& message) : std::runtime_error(message), code(code) {}
  const edgelm_code code;
};

inline std::string text_of(std::string_view part) { return std::string(part); }
inline std::string text_of(const char* part) { return part; }
template <class Number, class = std::enable_if_t<std::is_arithmetic_v<Number>>>
std::string text_of(Number number) {
  return std::to_string(number);
}

template <class... Parts>
std::string concat(const Parts&... parts) {
  return (std::string() + ... + text_of(parts));
}

template <class... Parts>
[[noreturn]] void fail(edgelm_code code, const Parts&... parts) {
  throw Error(code, concat(parts...));
}

// A string for a message: in quotes, control characters and invalid UTF-8 escaped, at most 80 characters.
std::string quoted(std::string_view text);

}  // namespace edgelm::capi
