#include "capi/generation/stop_strings.h"

#include <algorithm>

#include "capi/common/error.h"
#include "capi/common/unicode.h"

namespace edgelm::capi {

StopStrings::StopStrings(std::vector<std::string> stops) : stops_(std::move(stops)) {
  for (const std::string& stop : stops_) {
    if (stop.empty()) fail(EDGELM_INVALID_ARGUMENT, "stop string '' cannot be found in a text: give non-empty strings");
    if (valid_utf8_prefix(stop) != stop.size())
      fail(EDGELM_INVALID_ARGUMENT, "stop string ", quoted(stop), " is not UTF-8: it cannot be found in a text");
    longest_ = std::max(longest_, stop.size());
  }
}

std::pair<std::string, bool> StopStrings::push(std::string_view piece) {
  // Bytes can be compared in place of characters: text and stop strings begin and end between characters.
  std::string text = std::move(held_).append(piece);
  held_.clear();
  std::pair<std::size_t, std::size_t> first(std::string::npos, 0);  // end, begin
  for (const std::string& stop : stops_)
    if (const std::size_t at = text.find(stop); at != std::string::npos)
      first = std::min(first, {at + stop.size(), at});
  if (first.first != std::string::npos) {
    text.resize(first.second);
    return {std::move(text), true};
  }
  const std::size_t most = longest_ == 0 ? 0 : std::min(longest_ - 1, text.size());
  for (std::size_t length = most; length > 0; --length) {
    const std::string_view end = std::string_view(text).substr(text.size() - length);
    for (const std::string& stop : stops_)
      if (std::string_view(stop).substr(0, length) == end) {
        held_ = end;
        text.resize(text.size() - length);
        return {std::move(text), false};
      }
  }
  return {std::move(text), false};
}

std::string StopStrings::flush() { return std::exchange(held_, {}); }

}  // namespace edgelm::capi
