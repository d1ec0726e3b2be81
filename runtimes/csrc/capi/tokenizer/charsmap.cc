#include "capi/tokenizer/charsmap.h"

#include <cstring>

namespace edgelm::capi {

namespace {

// Parts of a unit, as in Darts-clone. A label of more than 8 bits is one of a value, and equals no byte.
std::uint32_t label_of(std::uint32_t unit) { return unit & 0x800000ff; }
bool has_leaf(std::uint32_t unit) { return (unit >> 8 & 1) != 0; }
std::uint32_t offset_of(std::uint32_t unit) { return unit >> 10 << ((unit & 0x200) >> 6); }

std::uint32_t read_unit(const char* data) {
  unsigned char bytes[4];
  std::memcpy(bytes, data, 4);
  return bytes[0] | bytes[1] << 8 | bytes[2] << 16 | static_cast<std::uint32_t>(bytes[3]) << 24;
}

}  // namespace

Charsmap::Charsmap(std::string_view data, const std::string& where) {
  if (data.empty()) return;
  const std::size_t size = data.size() < 4 ? 0 : read_unit(data.data());
  if (data.size() <= 4 || size >= data.size() - 4 || size % 4 != 0) {
    fail(EDGELM_TOKENIZER, where, ": its precompiled_charsmap is damaged; fetch the file again");
  }
  trie_ = data.substr(4, size);
  texts_ = data.substr(4 + size);
}

std::uint32_t Charsmap::unit(std::size_t index) const {
  // Beyond the end, a label that equals no byte.
  return index < trie_.size() / 4 ? read_unit(trie_.data() + 4 * index) : 0x80000000;
}

std::size_t Charsmap::longest(std::string_view text, std::size_t at, std::string_view& replacement) const {
  if (trie_.empty()) return 0;
  std::size_t position = offset_of(unit(0)), size = 0, value = 0;
  for (std::size_t i = at; i < text.size(); ++i) {
    const unsigned char byte = text[i];
    position ^= byte;
    const std::uint32_t node = unit(position);
    if (label_of(node) != byte) break;
    position ^= offset_of(node);
    if (has_leaf(node)) {
      size = i + 1 - at;
      value = unit(position) & 0x7fffffff;
    }
  }
  if (size != 0) {
    replacement = value < texts_.size() ? std::string_view(texts_).substr(value) : std::string_view();
    replacement = replacement.substr(0, replacement.find('\0'));
  }
  return size;
}

}  // namespace edgelm::capi
