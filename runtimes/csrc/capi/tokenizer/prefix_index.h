// Finds which strings of a set a text begins with.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string_view>
#include <utility>
#include <vector>

namespace edgelm::capi {

class PrefixIndex {
 public:
  // `text` is not empty, and outlives this.
  void add(std::string_view text, std::uint32_t value) { sorted_.emplace_back(text, value); }
  // Call once after all `add`. Of equal strings, the first is kept.
  void build();
  bool empty() const { return sorted_.empty(); }

  // Call `found(size, value)` for each string with which `text` goes on at `at`, the shortest first.
  template <class Found>
  void each(std::string_view text, std::size_t at, Found found) const {
    const unsigned char byte = text[at];
    auto begin = sorted_.begin() + first_[byte], end = sorted_.begin() + first_[byte + 1];
    // All strings from `begin` to `end` have their first `size` bytes in common with the text.
    for (std::size_t size = 1; begin != end; ++size) {
      if (begin->first.size() == size) {
        found(size, begin->second);
        ++begin;
      }
      if (at + size == text.size()) return;
      const unsigned char next = text[at + size];
      begin = std::lower_bound(begin, end, next, [size](const Entry& entry, unsigned char other) {
        return static_cast<unsigned char>(entry.first[size]) < other;
      });
      end = std::upper_bound(begin, end, next, [size](unsigned char other, const Entry& entry) {
        return other < static_cast<unsigned char>(entry.first[size]);
      });
    }
  }

  // The longest such string: its size, 0 where there is none.
  std::size_t longest(std::string_view text, std::size_t at, std::uint32_t& value) const {
    std::size_t longest = 0;
    each(text, at, [&](std::size_t size, std::uint32_t one) {
      longest = size;
      value = one;
    });
    return longest;
  }

 private:
  using Entry = std::pair<std::string_view, std::uint32_t>;
  std::vector<Entry> sorted_;
  std::uint32_t first_[257] = {};  // by first byte
};

}  // namespace edgelm::capi
