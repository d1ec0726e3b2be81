// Why a template cannot be read or rendered.
#pragma once

#include <exception>
#include <string>
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

// An error of an expression, as Python would raise it: raise_error("TypeError", "...").
template <class... Parts>
[[noreturn]] void raise_error(const char* type, const Parts&... parts) {
  throw Failure(Failure::kFailed, concat(type, ": ", concat(parts...)));
}

template <class... Parts>
[[noreturn]] void unsupported(const Parts&... parts) {
  throw Failure(Failure::kUnsupported, concat(parts...));
}

}  // namespace edgelm::capi::chat
