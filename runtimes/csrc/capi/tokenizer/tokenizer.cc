#include "capi/tokenizer/tokenizer.h"

#include <algorithm>

#include "capi/common/files.h"

namespace edgelm::capi {

namespace {

constexpr const char* kFile = "tokenizer.edgelm.json";
constexpr std::uint64_t kMaxBytes = 64 << 20;
constexpr std::int64_t kMaxIds = 1 << 22;  // MAX_IDS in edgelm/tokenization/added_tokens.py

// PROBES in edgelm/tokenization/tokenizer.py.
constexpr const char* kProbes[] = {
    "Hello, world!",
    "  two  spaces\n\n\ttab 12345 3.14",
    "def f(x):\n    return x**2  # Gr\u00f6\u00dfe",
    ("\u6f22\u5b57\u304b\u306a\u4ea4\u3058\u308a\u6587 \ud55c\uad6d\uc5b4 "
     "\u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u0939\u093f\u0928\u094d\u0926\u0940"),
    "\U0001f389\U0001f469\u200d\U0001f469\u200d\U0001f467 e\u0301 \u00e9 \ufffd",
    "<bos><s></s><|endoftext|><start_of_turn>user\n<|user|>\n",
};

LeadingSpace leading_space_of(const Members& fields) {
  const std::string& rule = fields.string("leading_space");
  if (rule == "keep") return LeadingSpace::kKeep;
  if (rule == "drop one") return LeadingSpace::kDropOne;
  if (rule == "drop one of the first piece") return LeadingSpace::kDropOnePiece;
  if (rule == "drop one of every piece until there is text") return LeadingSpace::kDropEachPiece;
  fields.refuse("leading_space", concat("is ", quoted(rule), ", which this version does not know"));
}

std::vector<TokenId> ids_of(const Members& fields, std::string_view key) {
  std::vector<TokenId> ids;
  for (const Json& item : fields.array(key)) {
    if (!item.is_integer() || item.integer() < 0 || item.integer() >= kMaxIds) {
      fields.refuse(key, "has something that is no token id");
    }
    ids.push_back(static_cast<TokenId>(item.integer()));
  }
  return ids;
}

std::optional<TokenId> id_of(const Members& fields, std::string_view key) {
  if (!fields.has(key)) return {};
  return static_cast<TokenId>(fields.integer(key, 0, kMaxIds - 1));
}

// Ids as json.dumps writes a list.
std::string list_of(const std::vector<TokenId>& ids) {
  std::string text = "[";
  for (const TokenId id : ids) text += concat(text.size() > 1 ? ", " : "", id);
  return text + "]";
}

std::string text_or_null(std::optional<TokenId> id) { return id ? std::to_string(*id) : "null"; }

std::string hex_of(std::string_view bytes) {
  constexpr char kDigits[] = "0123456789abcdef";
  std::string text;
  for (const unsigned char byte : bytes) {
    text += kDigits[byte >> 4];
    text += kDigits[byte & 15];
  }
  return text;
}

}  // namespace

Detokenizer::Detokenizer(const Tokenizer& tokenizer, bool skip_special)
    : tokenizer_(tokenizer), skip_special_(skip_special), at_start_(tokenizer.leading_space() != LeadingSpace::kKeep) {}

std::string Detokenizer::push(TokenId id) {
  if (skip_special_ && tokenizer_.is_special(id)) return "";
  std::string bytes = tokenizer_.vocabulary().token_bytes(id);
  if (at_start_) bytes = without_leading_space(id, std::move(bytes));
  return stream_.push(bytes);
}

std::string Detokenizer::without_leading_space(TokenId id, std::string bytes) {
  const LeadingSpace rule = tokenizer_.leading_space();
  const bool droppable = rule == LeadingSpace::kDropOne || !tokenizer_.vocabulary().is_byte(id);
  if (droppable && !bytes.empty() && bytes[0] == ' ') {
    bytes.erase(0, 1);
    at_start_ = rule == LeadingSpace::kDropEachPiece && bytes.empty();
  } else if (!bytes.empty()) {
    at_start_ = false;
  }
  return bytes;
}

std::string Detokenizer::flush() {
  at_start_ = tokenizer_.leading_space() != LeadingSpace::kKeep;
  return stream_.flush();
}

Tokenizer::Tokenizer(Json settings, const std::string& folder) : settings_(std::move(settings)) {
  const Members fields(settings_, join(folder, kFile), EDGELM_TOKENIZER);
  if (fields.string("format") != "edgelm-tokenizer" || fields.integer("format_version") != 1) {
    fields.refuse("format_version", "is of another version of EdgeLM: export the bundle again");
  }
  if (fields.has("unsupported")) {
    fail(EDGELM_TOKENIZER, folder, ": this tokenizer is not supported without Python: ", fields.string("unsupported"));
  }
  size_ = fields.integer("size", 1, kMaxIds);
  bos_id_ = id_of(fields, "bos_id");
  pad_id_ = id_of(fields, "pad_id");
  eos_ids_ = ids_of(fields, "eos_ids");
  special_ = ids_of(fields, "special");
  std::sort(special_.begin(), special_.end());
  add_bos_ = fields.boolean("add_bos");
  if (add_bos_ && !bos_id_) fields.refuse("add_bos", "is true, but there is no bos_id");
  leading_space_ = leading_space_of(fields);
  const std::string& kind = fields.string("kind");
  if (kind == "json") {
    vocabulary_ = open_json_vocabulary(join(folder, "tokenizer.json"), fields);
  } else if (kind == "pieces") {
    vocabulary_ = open_piece_vocabulary(join(folder, "tokenizer.model"), fields);
  } else {
    fields.refuse("kind", concat("is ", quoted(kind), ", which this version does not know"));
  }
}

std::unique_ptr<Tokenizer> Tokenizer::open(const std::string& folder) {
  const std::string path = join(folder, kFile);
  if (!is_file(path)) {
    fail(EDGELM_BUNDLE, folder, ": ", kFile, " is missing: export the bundle again with this version of EdgeLM");
  }
  Json settings = Json::parse(read_file(path, kMaxBytes, EDGELM_TOKENIZER), path, EDGELM_TOKENIZER);
  return std::unique_ptr<Tokenizer>(new Tokenizer(std::move(settings), folder));
}

std::unique_ptr<Tokenizer> Tokenizer::open(const Bundle& bundle) { return open(bundle.path()); }

std::vector<TokenId> Tokenizer::encode(std::string_view text, std::optional<bool> add_bos) const {
  if (const std::size_t valid = valid_utf8_prefix(text); valid != text.size()) {
    fail(EDGELM_TOKENIZER, "the text is not valid UTF-8 at byte ", valid);
  }
  std::vector<TokenId> ids;
  if (add_bos.value_or(add_bos_)) {
    if (!bos_id_) fail(EDGELM_TOKENIZER, "this tokenizer has no token that begins a text: do not ask for it");
    ids.push_back(*bos_id_);
  }
  vocabulary_->encode(text, ids);
  return ids;
}

std::string Tokenizer::decode(const std::vector<TokenId>& ids, bool skip_special) const {
  Detokenizer stream(*this, skip_special);
  std::string text;
  for (const TokenId id : ids) text += stream.push(id);
  return text + stream.flush();
}

bool Tokenizer::is_special(TokenId id) const { return std::binary_search(special_.begin(), special_.end(), id); }

std::string Tokenizer::fingerprint() const {
  Sha256 state;
  for (TokenId id = 0; id < size_; ++id)
    state.update(concat(id, " ", hex_of(vocabulary_->fingerprint_bytes(id)), "\n"));
  const Members fields = Members(settings_, kFile, EDGELM_TOKENIZER).object("fingerprint");
  std::string probes;
  for (const char* probe : kProbes) {
    std::vector<TokenId> ids;
    vocabulary_->encode(probe, ids);
    probes += (probes.empty() ? "" : ", ") + list_of(ids);
  }
  state.update(concat("[[", text_or_null(bos_id_), ", ", list_of(eos_ids_), ", ", text_or_null(pad_id_), ", ",
                      add_bos_ ? "true" : "false", ", ", list_of(ids_of(fields, "special")), "], [", probes, "]]"));
  state.update(fields.string("added"));
  return state.hex();
}

}  // namespace edgelm::capi
