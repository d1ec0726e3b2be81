// Read tokenizer.model, SentencePiece's protobuf, as edgelm/tokenization/piece_model.py.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "capi/common/error.h"

namespace edgelm::capi {

enum class PieceKind : std::uint8_t { kNormal = 1, kUnknown, kControl, kUserDefined, kUnused, kByte };

struct Piece {
  std::uint32_t start, size : 24, kind : 8;  // the name is in the file's bytes
  float score;
};

// Names with their ids, in an open hash table. Names are in `data` of the model that is asked.
class NameTable {
 public:
  explicit NameTable(std::size_t names);
  // False if the name is there already.
  bool insert(std::string_view name, std::uint32_t id, const class PieceModel& model);
  std::optional<std::uint32_t> find(std::string_view name, const class PieceModel& model) const;

 private:
  std::vector<std::uint32_t> slots_;  // bits of the hash, and id + 1; 0: empty. A power of two, at most half full
};

class PieceModel {
 public:
  // Throws Error(EDGELM_TOKENIZER).
  explicit PieceModel(const std::string& path);

  std::uint32_t size() const { return static_cast<std::uint32_t>(pieces_.size()); }
  std::string_view name(std::uint32_t id) const {
    return std::string_view(data_).substr(pieces_[id].start, pieces_[id].size);
  }
  PieceKind kind(std::uint32_t id) const { return static_cast<PieceKind>(pieces_[id].kind); }
  float score(std::uint32_t id) const { return pieces_[id].score; }
  std::uint32_t unknown_id() const { return unknown_; }

  // The id of a piece that may be part of a text: normal, user-defined or unused.
  std::optional<std::uint32_t> find(std::string_view name) const { return normal_.find(name, *this); }
  // The id of any piece, those that are not part of a text first; the unknown one for another name.
  std::uint32_t id_of(std::string_view name) const;

  // Settings of the trainer and the normaliser.
  int model_type = 1;
  bool byte_fallback = false, whitespace_as_suffix = false;
  bool dummy_prefix = true, remove_extra_whitespaces = true, escape_whitespaces = true;
  std::string_view charsmap;

 private:
  [[noreturn]] void refuse(const std::string& reason) const;
  void read(std::string_view message);
  void read_piece(std::string_view message);
  void read_settings(std::string_view message, bool trainer);
  void index();

  std::string path_, data_;
  std::vector<Piece> pieces_;
  NameTable normal_{0}, reserved_{0};
  std::uint32_t unknown_ = 0;
};

constexpr int kUnigramType = 1, kBpeType = 2;

// The byte of a name such as "<0x0A>".
std::optional<unsigned char> byte_of_name(std::string_view name);

}  // namespace edgelm::capi
