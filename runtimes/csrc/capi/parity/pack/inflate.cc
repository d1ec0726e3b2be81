#include "capi/parity/pack/inflate.h"

#include <cstdint>
#include <cstring>

namespace edgelm::capi {
namespace {

constexpr int kMostLength = 15, kFastBits = 9;
constexpr int kLiterals = 288, kDistances = 30;
constexpr int kEnd = 256;

class Bits {
 public:
  Bits(const unsigned char* data, std::size_t size) : at_(data), end_(data + size) {}

  std::uint32_t take(int count) {
    fill(count);
    const std::uint32_t value = std::uint32_t(held_ & ((std::uint64_t(1) << count) - 1));
    drop(count);
    return value;
  }
  // The next bits, zeros beyond the end; at least kMostLength of them are valid or beyond the end.
  std::uint32_t peek() {
    while (count_ <= 48 && at_ != end_) {
      held_ |= std::uint64_t(*at_++) << count_;
      count_ += 8;
    }
    return std::uint32_t(held_);
  }
  void drop(int count) {
    if (count > count_) throw Damaged("the compressed data ends early");
    held_ >>= count;
    count_ -= count;
  }
  // The bytes from the next whole one on.
  const unsigned char* bytes(std::size_t count) {
    drop(count_ % 8);
    at_ -= count_ / 8;
    held_ = 0, count_ = 0;
    if (count > std::size_t(end_ - at_)) throw Damaged("the compressed data ends early");
    const unsigned char* result = at_;
    at_ += count;
    return result;
  }

 private:
  void fill(int count) {
    peek();
    if (count > count_) throw Damaged("the compressed data ends early");
  }

  const unsigned char* at_;
  const unsigned char* end_;
  std::uint64_t held_ = 0;
  int count_ = 0;
};

// A canonical prefix code: short codes by a table, longer ones bit by bit.
class Code {
 public:
  // An incomplete code is allowed as in zlib: no symbol at all, or a single one.
  Code(const unsigned char* lengths, int count) {
    for (int i = 0; i < count; ++i) ++counts_[lengths[i]];
    const int used = count - counts_[0];
    counts_[0] = 0;
    int left = 1;
    for (int length = 1; length <= kMostLength; ++length) {
      left = 2 * left - counts_[length];
      if (left < 0) throw Damaged("a code of the compressed data has too many symbols");
    }
    if (left > 0 && used > 1) throw Damaged("a code of the compressed data is incomplete");
    int offsets[kMostLength + 2] = {};
    for (int length = 1; length <= kMostLength; ++length) offsets[length + 1] = offsets[length] + counts_[length];
    for (int i = 0; i < count; ++i) {
      if (lengths[i]) symbols_[offsets[lengths[i]]++] = std::uint16_t(i);
    }
    make_table();
  }

  int decode(Bits& bits) const {
    const std::uint32_t next = bits.peek();
    if (const std::uint16_t found = fast_[next & ((1 << kFastBits) - 1)]) {
      bits.drop(found & 15);
      return found >> 4;
    }
    int code = 0, first = 0, index = 0;
    for (int length = 1; length <= kMostLength; ++length) {
      code |= (next >> (length - 1)) & 1;
      if (code - counts_[length] < first) {
        bits.drop(length);
        return symbols_[index + code - first];
      }
      index += counts_[length];
      first = 2 * (first + counts_[length]);
      code *= 2;
    }
    throw Damaged("the compressed data has a code that stands for nothing");
  }

 private:
  void make_table() {
    int code = 0, index = 0;
    for (int length = 1; length <= kFastBits; ++length, code *= 2) {
      for (int i = 0; i < counts_[length]; ++i, ++code, ++index) {
        int reversed = 0;
        for (int bit = 0; bit < length; ++bit) reversed |= ((code >> bit) & 1) << (length - 1 - bit);
        const std::uint16_t entry = std::uint16_t(symbols_[index] << 4 | length);
        for (int place = reversed; place < 1 << kFastBits; place += 1 << length) fast_[place] = entry;
      }
    }
  }

  std::uint16_t fast_[1 << kFastBits] = {};  // symbol << 4 | length; 0: a longer code
  std::uint16_t symbols_[kLiterals] = {};
  int counts_[kMostLength + 1] = {};
};

constexpr std::uint16_t kLengths[29] = {3,  4,  5,  6,  7,  8,  9,  10, 11,  13,  15,  17,  19,  23, 27,
                                        31, 35, 43, 51, 59, 67, 83, 99, 115, 131, 163, 195, 227, 258};
constexpr unsigned char kLengthBits[29] = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2,
                                           2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 0};
constexpr std::uint16_t kOffsets[kDistances] = {1,    2,    3,    4,    5,    7,    9,    13,    17,    25,
                                                33,   49,   65,   97,   129,  193,  257,  385,   513,   769,
                                                1025, 1537, 2049, 3073, 4097, 6145, 8193, 12289, 16385, 24577};
constexpr unsigned char kOffsetBits[kDistances] = {0, 0, 0, 0, 1, 1, 2, 2,  3,  3,  4,  4,  5,  5,  6,
                                                   6, 7, 7, 8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13};

class Inflater {
 public:
  Inflater(const unsigned char* data, std::size_t size, std::size_t limit) : bits_(data, size), limit_(limit) {
    out_.reserve(limit);
  }

  std::vector<unsigned char> run() {
    for (bool last = false; !last;) {
      last = bits_.take(1) != 0;
      switch (bits_.take(2)) {
        case 0: stored(); break;
        case 1: fixed(); break;
        case 2: dynamic(); break;
        default: throw Damaged("the compressed data has a block of an unknown kind");
      }
    }
    return std::move(out_);
  }

 private:
  void require(std::size_t count) const {
    if (count > limit_ - out_.size()) throw Damaged("there is more data than expected");
  }

  void stored() {
    const unsigned char* head = bits_.bytes(4);
    const unsigned size = head[0] | unsigned(head[1]) << 8, check = head[2] | unsigned(head[3]) << 8;
    if ((size ^ check) != 0xffff) throw Damaged("a block of the compressed data has a wrong size");
    const unsigned char* data = bits_.bytes(size);
    require(size);
    out_.insert(out_.end(), data, data + size);
  }

  void fixed() {
    unsigned char lengths[kLiterals], distances[32];
    for (int i = 0; i < kLiterals; ++i) lengths[i] = i < 144 ? 8 : i < 256 ? 9 : i < 280 ? 7 : 8;
    std::memset(distances, 5, sizeof(distances));
    block(Code(lengths, kLiterals), Code(distances, 32));
  }

  void dynamic() {
    const int literals = int(bits_.take(5)) + 257, distances = int(bits_.take(5)) + 1, count = int(bits_.take(4)) + 4;
    if (literals > 286 || distances > kDistances) throw Damaged("a block of the compressed data has too many symbols");
    static constexpr unsigned char order[19] = {16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15};
    unsigned char of_lengths[19] = {};
    for (int i = 0; i < count; ++i) of_lengths[order[i]] = static_cast<unsigned char>(bits_.take(3));
    const Code code(of_lengths, 19);
    unsigned char lengths[kLiterals + kDistances] = {};
    for (int at = 0; at < literals + distances;) {
      const int symbol = code.decode(bits_);
      if (symbol < 16) {
        lengths[at++] = static_cast<unsigned char>(symbol);
        continue;
      }
      if (symbol == 16 && at == 0) throw Damaged("a block of the compressed data repeats a length that is not there");
      const unsigned char value = symbol == 16 ? lengths[at - 1] : 0;
      const int times = symbol == 16   ? 3 + int(bits_.take(2))
                        : symbol == 17 ? 3 + int(bits_.take(3))
                                       : 11 + int(bits_.take(7));
      if (at + times > literals + distances) throw Damaged("a block of the compressed data has too many lengths");
      std::memset(lengths + at, value, std::size_t(times));
      at += times;
    }
    if (lengths[kEnd] == 0) throw Damaged("a block of the compressed data has no end");
    block(Code(lengths, literals), Code(lengths + literals, distances));
  }

  void block(const Code& literals, const Code& distances) {
    for (;;) {
      const int symbol = literals.decode(bits_);
      if (symbol == kEnd) return;
      if (symbol < kEnd) {
        require(1);
        out_.push_back(static_cast<unsigned char>(symbol));
        continue;
      }
      if (symbol - 257 >= 29) throw Damaged("the compressed data has an unknown length");
      const std::size_t length = kLengths[symbol - 257] + bits_.take(kLengthBits[symbol - 257]);
      const int place = distances.decode(bits_);
      if (place >= kDistances) throw Damaged("the compressed data has an unknown distance");
      const std::size_t back = kOffsets[place] + bits_.take(kOffsetBits[place]);
      if (back > out_.size()) throw Damaged("the compressed data refers to data before its start");
      require(length);
      // What is copied may overlap what it is copied from.
      for (std::size_t i = 0; i < length; ++i) out_.push_back(out_[out_.size() - back]);
    }
  }

  Bits bits_;
  std::size_t limit_;
  std::vector<unsigned char> out_;
};

}  // namespace

std::vector<unsigned char> inflate(const unsigned char* data, std::size_t size, std::size_t limit) {
  return Inflater(data, size, limit).run();
}

}  // namespace edgelm::capi
