// Why a template cannot be read or rendered.
#pragma once

#include <cstdint>
#include <exception>
#include <initializer_list>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>

#include "capi/common/error.h"

namespace edgelm::capi::chat {

class Failure : public std::exception {
 public:
  enum Kind {
    kInvalid,      // the source is no template
    kUnsupported,  // a template, but beyond what this library renders
    kRefused,      // the template's own error about the messages
    kForbidden,    // an operation that templates may not use
    kFailed,       // an expression's error
    kLimit,        // a limit exceeded
  };
  Failure(Kind kind, std::string message) : kind(kind), message(std::move(message)) {}
  const char* what() const noexcept override { return message.c_str(); }

  const Kind kind;
  const std::string message;
};

// A part of a message. There are hundreds of messages, so each takes little code.
struct Part {
  Part(std::string_view text) : text(text) {}
  Part(const std::string& text) : text(text) {}
  Part(const char* text) : text(text) {}
  template <class Number, class = std::enable_if_t<std::is_integral_v<Number>>>
  Part(Number number) : number(static_cast<std::int64_t>(number)), is_number(true) {}

  const std::string_view text;
  const std::int64_t number = 0;
  const bool is_number = false;
};

std::string joined(std::initializer_list<Part> parts);
[[noreturn]] void throw_error(const char* type, std::initializer_list<Part> parts);
[[noreturn]] void throw_unsupported(std::initializer_list<Part> parts);

// An error of an expression, as Python would raise it: raise_error("TypeError", "...").
template <class... Parts>
[[noreturn]] void raise_error(const char* type, const Parts&... parts) {
  throw_error(type, {Part(parts)...});
}

template <class... Parts>
[[noreturn]] void unsupported(const Parts&... parts) {
  throw_unsupported({Part(parts)...});
}

// concat of common/error.h, for text and whole numbers.
template <class... Parts>
std::string concat(const Parts&... parts) {
  return joined({Part(parts)...});
}

}  // namespace edgelm::capi::chat
