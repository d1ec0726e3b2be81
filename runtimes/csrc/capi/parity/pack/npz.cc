#include "capi/parity/pack/npz.h"

#include <algorithm>
#include <cstring>

#include "capi/common/files.h"

namespace edgelm::capi {
namespace {

unsigned read16(const unsigned char* at) { return at[0] | unsigned(at[1]) << 8; }
std::uint32_t read32(const unsigned char* at) { return read16(at) | std::uint32_t(read16(at + 2)) << 16; }

constexpr std::size_t kEndSize = 22, kEntrySize = 46, kLocalSize = 30, kMostComment = 65535;
constexpr std::uint32_t kUnknown = 0xffffffff;  // the value is in a ZIP64 record

// The record at the end, which may be followed by a comment.
const unsigned char* end_record(const unsigned char* data, std::size_t size) {
  if (size < kEndSize) throw Damaged("it is no zip file");
  const std::size_t first = size - kEndSize > kMostComment ? size - kEndSize - kMostComment : 0;
  for (std::size_t at = size - kEndSize + 1; at-- > first;) {
    if (std::memcmp(data + at, "PK\5\6", 4) == 0 && read16(data + at + 20) + at + kEndSize <= size) return data + at;
  }
  throw Damaged("it is no zip file");
}

// The text of a Python literal, which a .npy file's header is: {'descr': '<f4', 'fortran_order': False, 'shape': (2,)}.
class Literal {
 public:
  explicit Literal(std::string_view text) : text_(text) {}

  bool accept(char expected) {
    space();
    if (at_ == text_.size() || text_[at_] != expected) return false;
    ++at_;
    return true;
  }
  void require(char expected) {
    if (!accept(expected)) throw Damaged("an array has a header that is none");
  }
  bool accept(std::string_view word) {
    space();
    if (text_.substr(at_, word.size()) != word) return false;
    at_ += word.size();
    return true;
  }
  std::string string() {
    space();
    const char quote = accept('"') ? '"' : (require('\''), '\'');
    const std::size_t end = text_.find(quote, at_);
    if (end == text_.npos || text_.substr(at_, end - at_).find('\\') != text_.npos) {
      throw Damaged("an array has a header that is none");
    }
    std::string result(text_.substr(at_, end - at_));
    at_ = end + 1;
    return result;
  }
  std::int64_t integer() {
    space();
    std::int64_t value = 0;
    const std::size_t first = at_;
    for (; at_ < text_.size() && text_[at_] >= '0' && text_[at_] <= '9'; ++at_) {
      if (value > (INT64_MAX - 9) / 10) throw Damaged("an array is too large");
      value = 10 * value + (text_[at_] - '0');
    }
    if (at_ == first) throw Damaged("an array has a header that is none");
    return value;
  }
  bool at_end() {
    space();
    return at_ == text_.size();
  }

 private:
  void space() {
    while (at_ < text_.size() && (text_[at_] == ' ' || text_[at_] == '\n' || text_[at_] == '\t')) ++at_;
  }

  std::string_view text_;
  std::size_t at_ = 0;
};

std::vector<std::int64_t> read_shape(Literal& text) {
  std::vector<std::int64_t> shape;
  text.require('(');
  while (!text.accept(')')) {
    shape.push_back(text.integer());
    if (shape.size() > 32) throw Damaged("an array has too many dimensions");
    if (text.accept(',')) continue;
    text.require(')');
    break;
  }
  return shape;
}

}  // namespace

ZipArchive::ZipArchive(const unsigned char* data, std::size_t size) : data_(data), size_(size) {
  const unsigned char* end = end_record(data, size);
  const unsigned count = read16(end + 10);
  const std::size_t length = read32(end + 12), offset = read32(end + 16), limit = std::size_t(end - data);
  if (read16(end + 8) != count || count == 0xffff) throw Damaged("it is a ZIP64 file, or a part of one");
  if (offset > limit || length > limit - offset) throw Damaged("its directory lies outside the file");
  const unsigned char *at = data + offset, *last = at + length;
  for (unsigned i = 0; i < count; ++i) {
    if (std::size_t(last - at) < kEntrySize || std::memcmp(at, "PK\1\2", 4) != 0) {
      throw Damaged("its directory is damaged");
    }
    const std::size_t name = read16(at + 28), more = name + read16(at + 30) + read16(at + 32);
    if (std::size_t(last - at) - kEntrySize < more) throw Damaged("its directory is damaged");
    const Entry entry = {read16(at + 8),  read16(at + 10), read32(at + 16),
                         read32(at + 20), read32(at + 24), read32(at + 42)};
    entries_[std::string(reinterpret_cast<const char*>(at + kEntrySize), name)] = entry;
    at += kEntrySize + more;
  }
}

std::vector<unsigned char> ZipArchive::read(const std::string& name, std::size_t limit) const {
  const auto found = entries_.find(name);
  if (found == entries_.end()) throw Damaged("a file is missing");
  const Entry& entry = found->second;
  if (entry.flags & 1) throw Damaged("it is encrypted");
  if (entry.packed == kUnknown || entry.unpacked == kUnknown || entry.offset == kUnknown) {
    throw Damaged("it is a ZIP64 file");
  }
  if (entry.unpacked > limit) throw Damaged("there is more data than expected");
  const unsigned char* local = data_ + std::min<std::size_t>(entry.offset, size_);
  const std::size_t room = std::size_t(data_ + size_ - local);
  if (room < kLocalSize || std::memcmp(local, "PK\3\4", 4) != 0) throw Damaged("its directory is damaged");
  const std::size_t start = kLocalSize + read16(local + 26) + read16(local + 28);
  if (room < start || room - start < entry.packed) throw Damaged("it ends early");
  std::vector<unsigned char> result;
  if (entry.method == 0) {
    result.assign(local + start, local + start + entry.packed);
  } else if (entry.method == 8) {
    result = inflate(local + start, entry.packed, entry.unpacked);
  } else {
    throw Damaged("it has compression of kind " + std::to_string(entry.method));
  }
  if (result.size() != entry.unpacked) throw Damaged("it ends early");
  if (crc32(result.data(), result.size()) != entry.crc32) throw Damaged("its checksum is wrong");
  return result;
}

NpyHeader read_npy_header(const unsigned char* data, std::size_t size) {
  if (size < 10 || std::memcmp(data, "\x93NUMPY", 6) != 0) throw Damaged("it holds a file that is no array");
  const int version = data[6];
  if (version < 1 || version > 3) throw Damaged("an array has format " + std::to_string(version));
  const std::size_t start = version == 1 ? 10 : 12;
  if (size < start) throw Damaged("an array ends early");
  const std::size_t length = version == 1 ? read16(data + 8) : read32(data + 8);
  if (length > kMostNpyHeader - 12) throw Damaged("an array has a header that is too long");
  if (size - start < length) throw Damaged("an array ends early");
  NpyHeader header = {"", false, {}, start + length};
  Literal text(std::string_view(reinterpret_cast<const char*>(data + start), length));
  unsigned seen = 0;
  text.require('{');
  while (!text.accept('}')) {
    const std::string key = text.string();
    text.require(':');
    if (key == "descr") {
      header.type = text.string();
      seen |= 1;
    } else if (key == "fortran_order") {
      header.by_columns = text.accept(std::string_view("True"));
      if (!header.by_columns && !text.accept(std::string_view("False")))
        throw Damaged("an array has a header that is none");
      seen |= 2;
    } else if (key == "shape") {
      header.shape = read_shape(text);
      seen |= 4;
    } else {
      throw Damaged("an array has a header that is none");
    }
    if (text.accept(',')) continue;
    text.require('}');
    break;
  }
  if (seen != 7 || !text.at_end()) throw Damaged("an array has a header that is none");
  return header;
}

}  // namespace edgelm::capi
