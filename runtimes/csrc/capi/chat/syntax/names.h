// The filters and tests of jinja2, and which of them this library has.
#pragma once

#include <string_view>

namespace edgelm::capi::chat {

enum class Known { kSupported, kUnsupported, kMissing };
Known filter_named(std::string_view name);
Known test_named(std::string_view name);

}  // namespace edgelm::capi::chat
