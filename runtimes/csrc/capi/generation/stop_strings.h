// Find stop strings in streamed text, as edgelm/generation/stop_strings.py.
#pragma once

#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace edgelm::capi {

// Ends a stream of text at the first stop string, which may be split over several calls of `push`. No part of a stop
// string is returned, and only text that could begin one is held back. The first is the one that is complete first; of
// several that end at the same place, the longest.
class StopStrings {
 public:
  // Throws Error(EDGELM_INVALID_ARGUMENT) if a string is empty or not UTF-8.
  explicit StopStrings(std::vector<std::string> stops);

  // Add whole characters; return the text that may be shown now, and whether a stop string was found.
  std::pair<std::string, bool> push(std::string_view piece);
  // The text held back; to be called when the text ends without a stop string.
  std::string flush();

 private:
  std::vector<std::string> stops_;
  std::size_t longest_ = 0;
  std::string held_;
};

}  // namespace edgelm::capi
