// Tests tokenizer.model on damaged files, and how ids become text; with --serve, encodes and decodes what tests in Python
// ask for: tests/capi/tokenizer_process.py.
#include "capi/tokenizer/tokenizer.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>

#include "capi/common/files.h"
#include "check.h"
#include "system.h"

namespace {

using edgelm::capi::concat;
using edgelm::capi::Detokenizer;
using edgelm::capi::Error;
using edgelm::capi::TokenId;
using edgelm::capi::Tokenizer;

// ---- a small tokenizer.model --------------------------------------------------------------------------------------

std::string Field(int number, const std::string& bytes) {
  std::string size;
  for (std::size_t rest = bytes.size(); size.empty() || rest != 0; rest >>= 7) {
    size += static_cast<char>((rest & 0x7f) | (rest > 0x7f ? 0x80 : 0));
  }
  return static_cast<char>(number << 3 | 2) + size + bytes;
}

std::string Number(int number, int value) {
  const int key = number << 3;
  return (key < 128 ? std::string(1, static_cast<char>(key))
                    : std::string{static_cast<char>(key | 0x80), static_cast<char>(key >> 7)}) +
         static_cast<char>(value);
}

std::string Piece(const std::string& name, float score, int kind) {
  std::string bits(4, '\0');
  std::memcpy(bits.data(), &score, 4);
  return Field(1, Field(1, name) + std::string(1, '\x15') + bits + Number(3, kind));
}

// `type`: 1 Unigram, 2 BPE.
std::string Model(int type, const std::string& charsmap = "") {
  std::string pieces = Piece("<unk>", 0, 2) + Piece("<s>", 0, 3) + Piece("</s>", 0, 3);
  const char* names[] = {"\u2581", "a", "b", "c", "ab", "\u2581a", "abc", "\u2581ab", "\u00e9", "\u6f22"};
  float score = -1;
  for (const char* name : names) pieces += Piece(name, score--, 1);
  pieces += Piece("abab", -2, 5) + Piece("<tool>", 0, 4);
  for (int byte = 0; byte < 256; ++byte) {
    char name[8];
    std::snprintf(name, sizeof name, "<0x%02X>", byte);
    pieces += Piece(name, 0, 6);
  }
  return pieces + Field(2, Number(3, type) + Number(35, 1)) + Field(3, charsmap.empty() ? "" : Field(2, charsmap));
}

// A precompiled_charsmap with one rule: "a" becomes `text`.
std::string RuleForA(const std::string& text) {
  std::uint32_t units[0x162] = {};
  units[0] = 0x100 << 10;                             // children of the root are at 0x100 ^ byte
  units[0x100 ^ 'a'] = 1 << 10 | 1 << 8 | 'a';        // a leaf, whose value is at its place ^ 1
  units[0x100 ^ 'a' ^ 1] = 0x80000000;                // the first text
  std::string result = {'\x88', '\x05', '\0', '\0'};  // bytes of the units
  for (const std::uint32_t unit : units) {
    for (int shift = 0; shift < 32; shift += 8) result += static_cast<char>(unit >> shift);
  }
  return result + text + '\0';
}

// ---- folders --------------------------------------------------------------------------------------------------------

class Folder {
 public:
  Folder() { path_ = edgelm_test::MakeFolder(); }
  ~Folder() { edgelm_test::RemoveFolder(path_); }
  void Write(const char* name, const std::string& data) const {
    std::FILE* file = std::fopen((path_ + "/" + name).c_str(), "wb");
    std::fwrite(data.data(), 1, data.size(), file);
    std::fclose(file);
  }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

std::string Description(const char* rules, const char* leading_space = "keep", const char* more = "") {
  return concat(R"({"format": "edgelm-tokenizer", "format_version": 1, "file": "tokenizer.model", "kind": "pieces",
    "size": 272, "bos_id": 1, "eos_ids": [2], "pad_id": null, "add_bos": true, "special": [1, 2],
    "leading_space": ")",
                leading_space, R"(", "rules": ")", rules, R"(", "prefix": "never", "unknown_id": 0,
    "unknown_text": " \u2047 ", "drops_unknown": false, "verbatim": [1, 2, 271], "normalizer": [],
    "split_special_tokens": false, "fingerprint": {"special": [1, 2], "added": ""}, "added_tokens": [
    {"id": 1, "content": "<s>", "special": true}, {"id": 2, "content": "</s>", "special": true},
    {"id": 271, "content": "<end>", "lstrip": true, "normalized": true}])",
                more, "}");
}

// What opening the folder and using the tokenizer throws; empty if nothing.
std::string Refusal(const Folder& folder) {
  try {
    const auto tokenizer = Tokenizer::open(folder.path());
    for (const char* text : {"ab abc\u00e9 \u6f22\u5b57 <s>abab <end> <tool>", "  a\tb ", "\u0301\u1e9b\ufb01"}) {
      const auto ids = tokenizer->encode(text);
      tokenizer->decode(ids, false);
    }
    return "";
  } catch (const Error& error) {
    return error.what();
  }
}

// ---- tests ----------------------------------------------------------------------------------------------------------

void TestTextBecomesPieces() {
  const Folder folder;
  folder.Write("tokenizer.model", Model(2));
  folder.Write("tokenizer.edgelm.json", Description("model"));
  const auto tokenizer = Tokenizer::open(folder.path());
  const auto ids = tokenizer->encode("abc</s>abc  <end>ab<tool>\u5b57");
  std::string text;
  for (const TokenId id : ids) text += concat(id, " ");
  EXPECT(text == "1 3 9 2 3 9 271 10 14 244 188 166 ", "%s", text.c_str());
  // "abab" is merged first, but unused.
  EXPECT(tokenizer->encode("abab", false) == std::vector<TokenId>({3, 7, 7}), "unused pieces are split again");
  EXPECT(tokenizer->decode(ids) == " abc abc<end> ab<tool>\u5b57", "%s", tokenizer->decode(ids).c_str());
}

void TestRulesReplaceCharactersWithinALimit() {
  const Folder folder;
  folder.Write("tokenizer.edgelm.json", Description("model"));
  folder.Write("tokenizer.model", Model(2, RuleForA(" b  c")));
  const auto tokenizer = Tokenizer::open(folder.path());
  const std::string text = tokenizer->decode(tokenizer->encode("cac a"));
  EXPECT(text == " c b  cc b  c", "'%s'", text.c_str());
  folder.Write("tokenizer.model", Model(2, RuleForA(std::string(2 << 20, 'x'))));
  EXPECT(Refusal(folder).find("make a text more than 64 times as long") != std::string::npos, "%s",
         Refusal(folder).c_str());
}

void TestTheSpaceBeforeATextIsDroppedByTheRule() {
  const Folder folder;
  folder.Write("tokenizer.model", Model(2));
  const TokenId space = 3, space_a = 8, byte_space = 15 + 0x20;
  const struct {
    const char *rule, *text;
    std::vector<TokenId> ids;
  } cases[] = {
      {"keep", "  a", {space, space_a}},
      {"drop one", " a", {space, space_a}},
      {"drop one", " a", {byte_space, space_a}},
      {"drop one of the first piece", " a", {space, space_a}},
      {"drop one of the first piece", "  a", {byte_space, space_a}},
      {"drop one of every piece until there is text", "a a", {space, space, space_a, space_a}},
      {"drop one of every piece until there is text", "  a", {space, byte_space, space_a}},
  };
  for (const auto& one : cases) {
    folder.Write("tokenizer.edgelm.json", Description("model", one.rule));
    const std::string text = Tokenizer::open(folder.path())->decode(one.ids);
    EXPECT(text == one.text, "%s: '%s', not '%s'", one.rule, text.c_str(), one.text);
  }
}

void TestADamagedModelIsRefusedOrUsedWithoutHarm() {
  const Folder folder;
  std::mt19937 random(5);
  // A trie that leads everywhere: offsets and labels are whatever the bytes give.
  std::string charsmap(4 + 4096 + 64, '\0');
  for (char& byte : charsmap) byte = static_cast<char>(random());
  charsmap.replace(0, 4, std::string("\x00\x10\x00\x00", 4));
  int refused = 0, used = 0;
  for (int type : {1, 2}) {
    for (const char* rules : {"model", "merges"}) {
      folder.Write("tokenizer.edgelm.json", Description(rules));
      const std::string model = Model(type, charsmap);
      for (int round = 0; round < 300; ++round) {
        std::string damaged = model;
        if (round % 3 == 0) damaged.resize(random() % damaged.size());
        for (unsigned flips = round % 3 == 0 ? 0 : 1 + random() % 8; flips > 0; --flips) {
          // The end has the settings and the rules; most bytes are pieces.
          const std::size_t at = round % 3 == 1 ? random() % damaged.size() : damaged.size() - 1 - random() % 4200;
          damaged[at] = static_cast<char>(damaged[at] ^ (1 << random() % 8));
        }
        folder.Write("tokenizer.model", damaged);
        (Refusal(folder).empty() ? used : refused)++;
      }
    }
  }
  EXPECT(refused > 300 && used > 100, "%d refused, %d used", refused, used);
}

void TestRefusalsNameTheFileAndTheReason() {
  const Folder folder;
  folder.Write("tokenizer.edgelm.json", Description("model"));
  const std::string many_same = Model(2) + Piece("ab", -9, 1);
  const struct {
    std::string model;
    const char* reason;
  } cases[] = {
      {"", "the vocabulary is empty"},
      {Model(3), "neither a BPE nor a Unigram model"},
      {many_same, "\"ab\" occurs twice"},
      {Piece("a", 0, 1), "no unknown piece"},
      {Model(2) + Piece("x", 0, 9), "a piece has no known type"},
      {Model(2) + Piece("\xff", 0, 1), "a piece that is not UTF-8"},
      {Model(2) + Piece("", 0, 1), "a piece without a name"},
      {Model(2) + "\x0a\x7f", "it ends too early"},
      {Model(2) + "\x0b", "a field of wire type 3"},
      {Model(2, "abc"), "precompiled_charsmap is damaged"},
  };
  for (const auto& one : cases) {
    folder.Write("tokenizer.model", one.model);
    const std::string refusal = Refusal(folder);
    EXPECT(refusal.find(one.reason) != std::string::npos && refusal.find(folder.path()) == 0, "'%s', not '%s'",
           refusal.c_str(), one.reason);
  }
  folder.Write("tokenizer.model", Model(2));
  folder.Write("tokenizer.edgelm.json", Description("model", "keep", R"(, "unsupported": "it is odd")"));
  EXPECT(Refusal(folder).find("it is odd") != std::string::npos, "%s", Refusal(folder).c_str());
  folder.Write("tokenizer.edgelm.json", Description("other"));
  EXPECT(Refusal(folder).find("rules is neither merges nor model") != std::string::npos, "%s", Refusal(folder).c_str());
}

// ---- requests of tests in Python --------------------------------------------------------------------------------------

bool Read(void* data, std::size_t size) { return std::fread(data, 1, size, stdin) == size; }

void Write(char kind, std::string_view data) {
  const auto size = static_cast<std::uint32_t>(data.size());
  std::fwrite(&kind, 1, 1, stdout);
  std::fwrite(&size, 4, 1, stdout);
  std::fwrite(data.data(), 1, data.size(), stdout);
  std::fflush(stdout);
}

std::string Answer(std::unique_ptr<Tokenizer>& tokenizer, char kind, const std::string& data) {
  if (kind == 'o') {
    tokenizer = Tokenizer::open(data);
    return "";
  }
  if (kind == 'f') return tokenizer->fingerprint();
  if (kind == 'e') {
    const std::vector<TokenId> ids = tokenizer->encode(data, false);
    return std::string(reinterpret_cast<const char*>(ids.data()), ids.size() * sizeof(TokenId));
  }
  std::vector<TokenId> ids(data.size() / sizeof(TokenId));
  if (!ids.empty()) std::memcpy(ids.data(), data.data(), ids.size() * sizeof(TokenId));
  return tokenizer->decode(ids, kind == 's');
}

int Serve() {
  std::unique_ptr<Tokenizer> tokenizer;
  char kind;
  while (Read(&kind, 1)) {
    std::uint32_t size;
    if (!Read(&size, 4)) return 1;
    std::string data(size, '\0');
    if (!Read(data.data(), size)) return 1;
    try {
      Write('=', Answer(tokenizer, kind, data));
    } catch (const Error& error) {
      Write('!', error.what());
    }
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1 && std::strcmp(argv[1], "--serve") == 0) return Serve();
  TestTextBecomesPieces();
  TestRulesReplaceCharactersWithinALimit();
  TestTheSpaceBeforeATextIsDroppedByTheRule();
  TestADamagedModelIsRefusedOrUsedWithoutHarm();
  TestRefusalsNameTheFileAndTheReason();
  return edgelm_test::Finish();
}
