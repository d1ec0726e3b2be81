// Tests tokenizer.json: how files are read, and that damaged and hostile ones are refused or used without harm.
// tests/capi/test_tokenizer_steps.py compares ids with the `tokenizers` library.
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <random>

#include "capi/common/error.h"
#include "capi/tokenizer/tokenizer.h"
#include "check.h"
#include "system.h"

namespace {

using edgelm::capi::Error;
using edgelm::capi::TokenId;
using edgelm::capi::Tokenizer;

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

constexpr const char* kModel = R"({"type": "BPE", "unk_token": "<unk>", "vocab": {"<unk>": 0, "a": 1, "b": 2, "ab": 3,
  "\u00e9": 4, "\ud83c\udf89": 5, "\"\\\/\n": 6, "aba": 7, "</s>": 9}, "merges": [["a", "b"], "ab a"]})";

std::string File(const std::string& model) {
  return R"({"version": "1.0", "x": [1, {"y": null}], "model": )" + model + "}";
}

std::string Description(const std::string& normalizer = "[]", const std::string& pre_tokenizer = "[]",
                        const std::string& type = "BPE", const std::string& added = "[]") {
  return R"({"format": "edgelm-tokenizer", "format_version": 1, "file": "tokenizer.json", "kind": "json", "size": 10,
    "bos_id": null, "eos_ids": [9], "pad_id": null, "add_bos": false, "special": [9], "leading_space": "keep",
    "split_special_tokens": false, "fingerprint": {"special": [9], "added": ""},
    "model": {"type": ")" +
         type + R"(", "unk_token": "<unk>", "unk_id": 0, "fuse_unk": false, "byte_fallback": false,
    "ignore_merges": false, "end_of_word_suffix": null},
    "decoder": {"byte_level": false, "replace": [], "byte_tokens": false}, "normalizer": )" +
         normalizer + R"(, "pre_tokenizer": )" + pre_tokenizer + R"(, "added_tokens": )" + added + "}";
}

// What opening the folder and encoding `text` throws; empty if nothing.
std::string Refusal(const Folder& folder, const std::string& text = "abab a\u00e9\U0001f389 </s> x") {
  try {
    const auto tokenizer = Tokenizer::open(folder.path());
    tokenizer->decode(tokenizer->encode(text));
    return "";
  } catch (const Error& error) {
    return error.what();
  }
}

std::string Ids(const Folder& folder, const std::string& text) {
  std::string result;
  for (const TokenId id : Tokenizer::open(folder.path())->encode(text)) result += std::to_string(id) + " ";
  return result;
}

void TestFilesAreReadInAnyOrderAndSpelling() {
  const Folder folder;
  folder.Write("tokenizer.edgelm.json", Description());
  const std::string merges_first = R"({"merges": ["a b", ["ab", "a"]], "vocab": {"a": 1, "b": 2, "ab": 3, "aba": 7,
    "\u00E9": 4, "\uD83C\uDF89": 5, "\u0022\u005c/\u000a": 6, "<unk>": 8, "<unk>": 0}})";
  for (const std::string& model : {std::string(kModel), merges_first}) {
    folder.Write("tokenizer.json", File(model));
    const std::string ids = Ids(folder, "ababab\u00e9\U0001f389\"x");
    EXPECT(ids == "3 3 3 4 5 0 0 ", "%s", ids.c_str());
    const std::string text = Tokenizer::open(folder.path())->decode({6, 5, 8, 7});
    EXPECT(text == "\"\\/\n\U0001f389aba", "%s", text.c_str());
  }
}

void TestRefusalsNameTheFileAndTheReason() {
  const Folder folder;
  folder.Write("tokenizer.edgelm.json", Description());
  const std::string many(300, '[');
  const struct {
    std::string file;
    const char* reason;
  } cases[] = {
      {"", "expected '{'"},
      {"{}", "it has no model"},
      {R"({"model": {}})", "its model has no vocabulary"},
      {File(kModel) + "x", "more follows its end"},
      {File(kModel).substr(0, 200), "a string has no end"},
      {File("{\"vocab\": {\"a"), "a string has no end"},
      {File("{\"vocab\": {\"\xff\": 1}}"), "not UTF-8"},
      {File("{\"vocab\": {\"a\n\": 1}}"), "a control character in a string"},
      {File(R"({"vocab": {"\ud83c": 1}})"), "an escape that is no character"},
      {File(R"({"vocab": {"\ud83c\u0041": 1}})"), "an escape that is no character"},
      {File(R"({"vocab": {"\x": 1}})"), "an unknown escape"},
      {File(R"({"vocab": {"a": 4194304}, "merges": []})"), "the id of \"a\" is not between 0 and 4194303"},
      {File(R"({"vocab": {"a": -1}, "merges": []})"), "the id of \"a\""},
      {File(R"({"vocab": {"a": 99999999999999999999999}, "merges": []})"), "the id of \"a\""},
      {File(R"({"vocab": {"a": 1.5}, "merges": []})"), "the id of \"a\""},
      {File(R"({"vocab": {"a": 1}, "merges": [["a", "b"]]})"), "a merge does not make one token of two"},
      {File(R"({"vocab": {"a": 1, "b": 2}, "merges": ["a b"]})"), "a merge does not make one token of two"},
      {File(R"({"vocab": {"a": 1, " ": 2, "a ": 3}, "merges": ["a  "]})"), "a merge does not make one token of two"},
      {File(R"({"vocab": {"a": 1}, "vocab": {}, "merges": []})"), "two vocabularies"},
      {File(R"({"vocab": {"a": 1}})"), "its BPE has no merges"},
      {File(R"({"vocab": [["a", 1e999]], "merges": []})"), "a score of its vocabulary is not finite"},
      {R"({"x": )" + many + "}", "values within values without end"},
  };
  for (const auto& one : cases) {
    folder.Write("tokenizer.json", one.file);
    const std::string refusal = Refusal(folder);
    EXPECT(refusal.find(one.reason) != std::string::npos && refusal.find(folder.path()) == 0, "'%s', not '%s'",
           refusal.c_str(), one.reason);
  }
}

void TestStepsThatAreNotKnownOrNotCompleteAreRefused() {
  const Folder folder;
  folder.Write("tokenizer.json", File(kModel));
  const struct {
    const char *normalizer, *pre_tokenizer, *type, *reason;
  } cases[] = {
      {"[{\"type\": \"Odd\"}]", "[]", "BPE", "its normalizer has the step \"Odd\""},
      {"[]", "[{\"type\": \"Odd\"}]", "BPE", "its pre_tokenizer has the step \"Odd\""},
      {"[]", "[]", "WordLevel", "\"WordLevel\", which this library does not have"},
      {"[]", "[]", "Unigram", "its Unigram has no scores"},
      {"[{\"type\": \"Replace\", \"content\": \"x\"}]", "[]", "BPE", "pattern"},
      {"[]", "[{\"type\": \"Split\", \"pattern\": {\"Regex\": \"(\"}, \"behavior\": \"Isolated\", \"invert\": false}]",
       "BPE", "'(' without ')'"},
      {"[]", "[{\"type\": \"Split\", \"pattern\": {\"String\": \"a\"}, \"behavior\": \"Odd\", \"invert\": false}]",
       "BPE", "behavior is \"Odd\""},
      {"[]", "[{\"type\": \"FixedLength\", \"length\": 0}]", "BPE", "length"},
      {"[]", "[{\"type\": \"Metaspace\", \"replacement\": \"\", \"prepend_scheme\": \"first\", \"split\": true}]",
       "BPE", "replacement is not one character"},
  };
  for (const auto& one : cases) {
    folder.Write("tokenizer.edgelm.json", Description(one.normalizer, one.pre_tokenizer, one.type));
    const std::string refusal = Refusal(folder);
    EXPECT(refusal.find(one.reason) != std::string::npos, "'%s', not '%s'", refusal.c_str(), one.reason);
  }
}

void TestStepsThatExplodeEndInAnError() {
  const Folder folder;
  folder.Write("tokenizer.json", File(kModel));
  std::string grow = "[";
  for (int i = 0; i < 20; ++i) {
    grow += std::string(i ? "," : "") + R"({"type": "Replace", "pattern": {"String": "a"}, "content": "aaaaaaaa"})";
  }
  const std::string everywhere = R"([{"type": "Replace", "pattern": {"Regex": ""}, "content": ")" +
                                 std::string(100000, 'x') + R"("}])";
  for (const std::string& normalizer : {grow + "]", everywhere}) {
    folder.Write("tokenizer.edgelm.json", Description(normalizer));
    const std::string refusal = Refusal(folder, std::string(1000, 'a'));
    EXPECT(refusal.find("normalizer makes a text of 1000 bytes too long") != std::string::npos, "%s", refusal.c_str());
  }
}

void TestALongWordIsMergedInTime() {
  const Folder folder;
  folder.Write("tokenizer.json", File(kModel));
  folder.Write("tokenizer.edgelm.json", Description());
  std::string text;
  for (int i = 0; i < 500000; ++i) text += i % 3 == 2 ? "b" : "a";
  const std::clock_t start = std::clock();
  const auto ids = Tokenizer::open(folder.path())->encode(text);
  const double seconds = double(std::clock() - start) / CLOCKS_PER_SEC;
  EXPECT(ids.size() == 166668 && seconds < 20, "%zu ids in %.1f s", ids.size(), seconds);
}

void TestUnigramFindsTheBestTokens() {
  const Folder folder;
  folder.Write("tokenizer.json", File(R"({"vocab": [["<unk>", 0], ["a", 0.0], ["b", 0], ["c", 0], ["d", 0], ["cd", 1],
    ["ab", 2], ["abc", 5], ["abcd", 10.5e0], ["</s>", 0]]})"));
  folder.Write("tokenizer.edgelm.json", Description("[]", "[]", "Unigram"));
  const std::string ids = Ids(folder, "abcdacdxxab");
  EXPECT(ids == "8 1 5 0 6 ", "%s", ids.c_str());  // unknown characters are one token
  // A token as long as the text, which may begin everywhere.
  const std::string a(20000, 'a');
  folder.Write("tokenizer.json", File(R"({"vocab": [["<unk>", 0], ["a", -1], [")" + a + R"(", -1]]})"));
  EXPECT(Refusal(folder, a + a + a + a).find("takes too long") != std::string::npos, "%s", Refusal(folder).c_str());
}

void TestDamagedFilesAreRefusedOrUsedWithoutHarm() {
  const Folder folder;
  std::mt19937 random(9);
  const std::string added = R"([{"id": 9, "content": "</s>", "special": true},
    {"id": 8, "content": "ab", "lstrip": true, "rstrip": true, "single_word": true, "normalized": true}])";
  const std::string description = Description(
      R"([{"type": "NFC"}, {"type": "Replace", "pattern": {"String": " "}, "content": "_"}, {"type": "Lowercase"}])",
      R"([{"type": "Split", "pattern": {"Regex": " ?[^\\s\\p{L}]+(?!a)|(?i:a)+?b|\\s+"}, "behavior": "Isolated",
          "invert": false}, {"type": "Metaspace", "replacement": "_", "prepend_scheme": "always", "split": true}])",
      "BPE", added);
  int refused = 0, used = 0;
  for (const bool of_file : {true, false}) {
    folder.Write("tokenizer.json", File(kModel));
    folder.Write("tokenizer.edgelm.json", description);
    EXPECT(Refusal(folder).empty(), "%s", Refusal(folder).c_str());
    const std::string whole = of_file ? File(kModel) : description;
    for (int round = 0; round < 1500; ++round) {
      std::string damaged = whole;
      const std::size_t at = random() % whole.size();
      if (round % 4 == 0) damaged.resize(at);
      if (round % 4 == 1) damaged.erase(at, random() % 20);
      if (round % 4 == 2) damaged.insert(at, whole.substr(random() % whole.size(), random() % 20));
      if (round % 4 == 3) damaged[at] = static_cast<char>(damaged[at] ^ (1 << random() % 8));
      folder.Write(of_file ? "tokenizer.json" : "tokenizer.edgelm.json", damaged);
      const std::string refusal = Refusal(folder);
      EXPECT(refusal.find('\n') == std::string::npos, "%s", refusal.c_str());
      (refusal.empty() ? used : refused)++;
    }
  }
  EXPECT(refused > 1000 && used > 100, "%d refused, %d used", refused, used);
}

}  // namespace

int main() {
  TestFilesAreReadInAnyOrderAndSpelling();
  TestRefusalsNameTheFileAndTheReason();
  TestStepsThatAreNotKnownOrNotCompleteAreRefused();
  TestStepsThatExplodeEndInAnError();
  TestALongWordIsMergedInTime();
  TestUnigramFindsTheBestTokens();
  TestDamagedFilesAreRefusedOrUsedWithoutHarm();
  return edgelm_test::Finish();
}
