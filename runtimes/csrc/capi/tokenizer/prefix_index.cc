#include "capi/tokenizer/prefix_index.h"

namespace edgelm::capi {

void PrefixIndex::build() {
  const auto less = [](const Entry& a, const Entry& b) { return a.first < b.first; };
  const auto equal = [](const Entry& a, const Entry& b) { return a.first == b.first; };
  std::stable_sort(sorted_.begin(), sorted_.end(), less);
  sorted_.erase(std::unique(sorted_.begin(), sorted_.end(), equal), sorted_.end());
  std::size_t at = 0;
  for (int byte = 0; byte < 256; ++byte) {
    first_[byte] = static_cast<std::uint32_t>(at);
    while (at < sorted_.size() && static_cast<unsigned char>(sorted_[at].first[0]) == byte) ++at;
  }
  first_[256] = static_cast<std::uint32_t>(at);
}

}  // namespace edgelm::capi
