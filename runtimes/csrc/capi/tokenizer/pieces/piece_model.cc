#include "capi/tokenizer/pieces/piece_model.h"

#include <cstring>

#include "capi/common/files.h"
#include "capi/common/unicode.h"

namespace edgelm::capi {

namespace {

constexpr std::uint64_t kMaxBytes = 64 << 20;  // Gemma's 256 000 pieces take 4 MB
constexpr int kIdBits = 22;
constexpr std::size_t kMaxPieces = (1 << kIdBits) - 1;
constexpr std::size_t kMaxNameBytes = (1 << 24) - 1;
// A file whose names are chosen to share a place would take quadratic time.
constexpr std::size_t kMaxSteps = 10000;

std::uint64_t hash_of(std::string_view text) {
  std::uint64_t hash = 0xcbf29ce484222325;
  for (const unsigned char byte : text) hash = (hash ^ byte) * 0x100000001b3;
  return hash ^ hash >> 29;
}

// Bits of the hash that are kept beside an id, so that few names are compared.
std::uint32_t tag_of(std::uint64_t hash) { return static_cast<std::uint32_t>(hash >> 40) << kIdBits; }

bool is_name(std::uint32_t slot, std::uint32_t tag, std::string_view name, const PieceModel& model) {
  return (slot & ~static_cast<std::uint32_t>(kMaxPieces)) == tag && model.name((slot & kMaxPieces) - 1) == name;
}

struct Damaged { std::string reason; };

struct Field {
  std::uint64_t number, value;  // `value` of wire type 0
  int type;
  std::string_view bytes;  // of the other types
};

// The fields of a message of protobuf, one after the other.
class Fields {
 public:
  explicit Fields(std::string_view message) : rest_(message) {}

  bool next(Field& field) {
    if (rest_.empty()) return false;
    if (++count_ > kMaxPieces) throw Damaged{concat("more than ", kMaxPieces, " fields")};
    const std::uint64_t key = varint();
    field = {key >> 3, 0, static_cast<int>(key & 7), {}};
    switch (field.type) {
      case 0: field.value = varint(); break;
      case 1: field.bytes = take(8); break;
      case 2: field.bytes = take(varint()); break;
      case 5: field.bytes = take(4); break;
      default: throw Damaged{concat("a field of wire type ", field.type)};
    }
    return true;
  }

 private:
  std::uint64_t varint() {
    std::uint64_t value = 0;
    for (int shift = 0; shift < 64; shift += 7) {
      const unsigned char byte = take(1)[0];
      value |= static_cast<std::uint64_t>(byte & 0x7f) << shift;
      if (byte < 0x80) return value;
    }
    throw Damaged{"a number of more than 64 bits"};
  }

  std::string_view take(std::uint64_t size) {
    if (size > rest_.size()) throw Damaged{"it ends too early"};
    const std::string_view taken = rest_.substr(0, size);
    rest_.remove_prefix(size);
    return taken;
  }

  std::string_view rest_;
  std::size_t count_ = 0;
};

int digit_of(char character) {
  if (character >= '0' && character <= '9') return character - '0';
  if (character >= 'a' && character <= 'f') return character - 'a' + 10;
  if (character >= 'A' && character <= 'F') return character - 'A' + 10;
  return -1;
}

}  // namespace

NameTable::NameTable(std::size_t names) {
  std::size_t slots = 16;
  while (slots < 2 * names) slots *= 2;
  slots_.resize(slots);
}

bool NameTable::insert(std::string_view name, std::uint32_t id, const PieceModel& model) {
  const std::uint64_t hash = hash_of(name), mask = slots_.size() - 1;
  const std::uint32_t tag = tag_of(hash);
  std::size_t slot = hash & mask;
  for (std::size_t steps = 0; slots_[slot] != 0; slot = (slot + 1) & mask) {
    if (is_name(slots_[slot], tag, name, model)) return false;
    if (++steps > kMaxSteps) throw Damaged{"its names are not those of a vocabulary"};
  }
  slots_[slot] = tag | (id + 1);
  return true;
}

std::optional<std::uint32_t> NameTable::find(std::string_view name, const PieceModel& model) const {
  const std::uint64_t hash = hash_of(name), mask = slots_.size() - 1;
  const std::uint32_t tag = tag_of(hash);
  for (std::size_t slot = hash & mask; slots_[slot] != 0; slot = (slot + 1) & mask) {
    if (is_name(slots_[slot], tag, name, model)) return (slots_[slot] & kMaxPieces) - 1;
  }
  return {};
}

std::optional<unsigned char> byte_of_name(std::string_view name) {
  if (name.size() != 6 || name.substr(0, 3) != "<0x" || name[5] != '>') return {};
  const int high = digit_of(name[3]), low = digit_of(name[4]);
  if (high < 0 || low < 0) return {};
  return static_cast<unsigned char>(high << 4 | low);
}

PieceModel::PieceModel(const std::string& path) : path_(path), data_(read_file(path, kMaxBytes, EDGELM_TOKENIZER)) {
  try {
    read(data_);
    index();
  } catch (const Damaged& damage) {
    refuse(damage.reason);
  }
}

void PieceModel::refuse(const std::string& reason) const {
  fail(EDGELM_TOKENIZER, path_, ": not a usable tokenizer.model (", reason, "); fetch the file again");
}

void PieceModel::read(std::string_view message) {
  Fields fields(message);
  for (Field field; fields.next(field);) {
    if (field.type != 2) continue;
    if (field.number == 1) read_piece(field.bytes);
    if (field.number == 2 || field.number == 3) read_settings(field.bytes, field.number == 2);
  }
  if (pieces_.empty()) throw Damaged{"the vocabulary is empty"};
}

void PieceModel::read_piece(std::string_view message) {
  Piece piece = {0, 0, static_cast<std::uint8_t>(PieceKind::kNormal), 0};
  Fields fields(message);
  for (Field field; fields.next(field);) {
    const int expected = field.number == 1 ? 2 : field.number == 2 ? 5 : field.number == 3 ? 0 : field.type;
    if (field.type != expected) throw Damaged{"a piece with fields of the wrong type"};
    if (field.number == 1) {
      if (field.bytes.size() > kMaxNameBytes) throw Damaged{"the name of a piece is too long"};
      piece.start = static_cast<std::uint32_t>(field.bytes.data() - data_.data());
      piece.size = static_cast<std::uint32_t>(field.bytes.size());
    } else if (field.number == 2) {
      const unsigned char* bytes = reinterpret_cast<const unsigned char*>(field.bytes.data());
      const std::uint32_t bits = bytes[0] | bytes[1] << 8 | bytes[2] << 16 | static_cast<std::uint32_t>(bytes[3]) << 24;
      std::memcpy(&piece.score, &bits, 4);
    } else if (field.number == 3) {
      if (field.value < 1 || field.value > 6) throw Damaged{"a piece has no known type"};
      piece.kind = static_cast<std::uint8_t>(field.value);
    }
  }
  if (pieces_.size() == kMaxPieces) throw Damaged{concat("more than ", kMaxPieces, " pieces")};
  pieces_.push_back(piece);
}

void PieceModel::read_settings(std::string_view message, bool trainer) {
  Fields fields(message);
  for (Field field; fields.next(field);) {
    const bool flag = field.value != 0;
    if (trainer && field.type == 0) {
      if (field.number == 3) model_type = field.value > 4 ? 0 : static_cast<int>(field.value);
      if (field.number == 24) whitespace_as_suffix = flag;
      if (field.number == 35) byte_fallback = flag;
    } else if (!trainer && field.type == 0) {
      if (field.number == 3) dummy_prefix = flag;
      if (field.number == 4) remove_extra_whitespaces = flag;
      if (field.number == 5) escape_whitespaces = flag;
    } else if (!trainer && field.type == 2 && field.number == 2) {
      charsmap = field.bytes;
    }
  }
}

void PieceModel::index() {
  std::size_t num_reserved = 0;
  const auto is_reserved = [this](std::uint32_t id) {
    return kind(id) == PieceKind::kUnknown || kind(id) == PieceKind::kControl || kind(id) == PieceKind::kByte;
  };
  for (std::uint32_t id = 0; id < size(); ++id) num_reserved += is_reserved(id);
  normal_ = NameTable(pieces_.size() - num_reserved);
  reserved_ = NameTable(num_reserved);
  bool has_unknown = false;
  for (std::uint32_t id = 0; id < size(); ++id) {
    if (name(id).empty()) throw Damaged{"a piece without a name"};
    if (valid_utf8_prefix(name(id)) != name(id).size()) throw Damaged{"a piece that is not UTF-8"};
    if (!(is_reserved(id) ? reserved_ : normal_).insert(name(id), id, *this)) {
      throw Damaged{concat(quoted(name(id)), " occurs twice")};
    }
    if (kind(id) == PieceKind::kUnknown) {
      if (has_unknown) throw Damaged{"two unknown pieces"};
      has_unknown = true;
      unknown_ = id;
    }
    if (kind(id) == PieceKind::kByte && !byte_of_name(name(id))) {
      throw Damaged{concat(quoted(name(id)), " is not the name of a byte")};
    }
  }
  if (!has_unknown) throw Damaged{"no unknown piece"};
}

std::uint32_t PieceModel::id_of(std::string_view name) const {
  if (const auto id = reserved_.find(name, *this)) return *id;
  return find(name).value_or(unknown_);
}

}  // namespace edgelm::capi
