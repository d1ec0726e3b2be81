// Checks of conversations before a template sees them.
#pragma once

#include "capi/common/json.h"

namespace edgelm::capi::chat {

// The messages as templates get them: without null values, and with their reasoning under all keys. With `joined`,
// contents that are lists of texts become one text each. Throws Error(EDGELM_INVALID_ARGUMENT) for malformed ones.
Json checked_messages(const Json& messages, bool joined);

}  // namespace edgelm::capi::chat
