// Failures inside the library: an exception with a code, which the C functions turn into an edgelm_error.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>

#include "capi/edgelm.h"

namespace edgelm::capi {

class Error : public std::runtime_error {
 public:
  Error(edgelm_code code, const std::string& message) : std::runtime_error(message), code(code) {}
  const edgelm_code code;
};

// A part of a message. Of these, and not of strings, a message is joined in one function: each place that fails takes a few
// instructions, and there are a thousand.
class Part {
 public:
  Part(std::string_view text) : text_(text) {}
  Part(const std::string& text) : text_(text) {}
  Part(const char* text) : text_(text) {}
  template <class Number, class = std::enable_if_t<std::is_arithmetic_v<Number>>>
  Part(Number number) {
    if constexpr (std::is_floating_point_v<Number>) {
      real_ = number;
      kind_ = kReal;
    } else {
      bits_ = static_cast<std::uint64_t>(number);
      kind_ = std::is_signed_v<Number> ? kSigned : kUnsigned;
    }
  }
  void append_to(std::string& message) const;

 private:
  enum Kind : unsigned char { kText, kSigned, kUnsigned, kReal };
  std::string_view text_;
  union {
    std::uint64_t bits_ = 0;
    double real_;
  };
  Kind kind_ = kText;
};

std::string joined(const Part* parts, std::size_t count);
[[noreturn]] void fail_with(edgelm_code code, const Part* parts, std::size_t count);

template <class... Parts>
std::string concat(const Parts&... parts) {
  const Part all[] = {Part(parts)...};
  return joined(all, sizeof...(parts));
}

template <class... Parts>
[[noreturn]] void fail(edgelm_code code, const Parts&... parts) {
  const Part all[] = {Part(parts)...};
  fail_with(code, all, sizeof...(parts));
}

// A string for a message: in quotes, control characters and invalid UTF-8 escaped, at most 80 characters.
std::string quoted(std::string_view text);

}  // namespace edgelm::capi
