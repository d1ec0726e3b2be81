#include "capi/tokenizer/json/pre_tokenizer.h"

#include <algorithm>
#include <array>

#include "capi/common/error.h"
#include "capi/common/unicode.h"
#include "capi/tokenizer/json/pattern.h"

namespace edgelm::capi {

struct PreTokenizer::Step {
  virtual ~Step() = default;
  virtual void run(Words& words) const = 0;
};

namespace {

// A part of a word: what was searched for, or what is between.
struct Span {
  std::size_t start, end;
  bool found;
};

enum class Behavior { kRemoved, kIsolated, kMergedWithPrevious, kMergedWithNext, kContiguous };

Behavior read_behavior(const Members& step) {
  const std::string& name = step.string("behavior");
  constexpr const char* kNames[] = {"Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous"};
  for (std::size_t i = 0; i < std::size(kNames); ++i) {
    if (name == kNames[i]) return static_cast<Behavior>(i);
  }
  step.refuse("behavior", "is " + quoted(name) + ", which this library does not know");
}

// The whole of a text by the matches in it.
void fill(const std::vector<Regex::Match>& matches, std::size_t size, bool invert, std::vector<Span>& spans) {
  std::size_t end = 0;
  spans.clear();
  for (const Regex::Match& match : matches) {
    if (end != match.start) spans.push_back({end, match.start, invert});
    spans.push_back({match.start, match.end, !invert});
    end = match.end;
  }
  if (end != size) spans.push_back({end, size, invert});
}

// The whole of a text by characters for which `found(character)` holds, each a span of its own.
template <class Found>
void fill_characters(std::string_view text, const Found& found, std::vector<Span>& spans) {
  spans.clear();
  std::size_t end = 0;
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t start = at;
    if (!found(next_character(text, at))) continue;
    if (end < start) spans.push_back({end, start, false});
    spans.push_back({start, at, true});
    end = at;
  }
  if (end < text.size()) spans.push_back({end, text.size(), false});
}

// Join spans by a behaviour, as NormalizedString::split of the `tokenizers` library.
void join(std::vector<Span>& spans, Behavior behavior) {
  std::vector<Span> result;
  bool previous = false;
  const auto add = [&](const Span& span, bool joins) {
    if (joins && !result.empty()) {
      result.back().start = std::min(result.back().start, span.start);
      result.back().end = std::max(result.back().end, span.end);
    } else {
      result.push_back(span);
    }
    previous = span.found;
  };
  switch (behavior) {
    case Behavior::kIsolated: return;
    case Behavior::kRemoved:
      spans.erase(std::remove_if(spans.begin(), spans.end(), [](const Span& span) { return span.found; }), spans.end());
      return;
    case Behavior::kContiguous:
      for (const Span& span : spans) add(span, span.found == previous);
      break;
    case Behavior::kMergedWithPrevious:
      for (const Span& span : spans) add(span, span.found && !previous);
      break;
    case Behavior::kMergedWithNext:
      for (auto span = spans.rbegin(); span != spans.rend(); ++span) add(*span, span->found && !previous);
      std::reverse(result.begin(), result.end());
      break;
  }
  spans = std::move(result);
}

// A step that cuts without changing the text: `spans(text, spans)` fills in the spans.
template <class Spans>
void cut(Words& words, Behavior behavior, const Spans& fill_spans) {
  std::vector<Word> result;
  result.reserve(words.words.size());
  std::vector<Span> spans;
  for (const Word& word : words.words) {
    fill_spans(word.text, spans);
    join(spans, behavior);
    for (const Span& span : spans) {
      if (span.end > span.start) {
        result.push_back({word.text.substr(span.start, span.end - span.start), word.at_start && span.start == 0});
      }
    }
  }
  words.words = std::move(result);
}

template <class Found>
void cut_characters(Words& words, Behavior behavior, const Found& found) {
  cut(words, behavior, [&](std::string_view text, std::vector<Span>& spans) { fill_characters(text, found, spans); });
}

class SplitStep final : public PreTokenizer::Step {
 public:
  explicit SplitStep(const Members& step)
      : pattern_(step), behavior_(read_behavior(step)), invert_(step.boolean("invert")) {}
  void run(Words& words) const override {
    cut(words, behavior_, [&](std::string_view text, std::vector<Span>& spans) {
      fill(pattern_.find_all(text), text.size(), invert_, spans);
    });
  }

 private:
  const Pattern pattern_;
  const Behavior behavior_;
  const bool invert_;
};

class ByteLevelStep final : public PreTokenizer::Step {
 public:
  explicit ByteLevelStep(const Members& step) : add_space_(step.boolean("add_prefix_space")) {
    if (step.boolean("use_regex")) {
      regex_.emplace(R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)");
    }
  }
  void run(Words& words) const override {
    if (add_space_) {
      for (Word& word : words.words) {
        if (word.text.front() != ' ') word.text = words.strings.emplace_back(" " + std::string(word.text));
      }
    }
    if (regex_) {
      cut(words, Behavior::kIsolated, [&](std::string_view text, std::vector<Span>& spans) {
        fill(regex_->find_all(text), text.size(), false, spans);
      });
    }
    std::size_t size = 0;
    for (const Word& word : words.words) {
      for (const char byte : word.text) size += byte_character(static_cast<unsigned char>(byte)).size();
    }
    std::string& all = words.strings.emplace_back();
    all.reserve(size);
    for (Word& word : words.words) {
      const std::size_t start = all.size();
      for (const char byte : word.text) all += byte_character(static_cast<unsigned char>(byte));
      word.text = std::string_view(all).substr(start);
    }
  }

 private:
  const bool add_space_;
  std::optional<Regex> regex_;
};

class MetaspaceStep final : public PreTokenizer::Step {
 public:
  explicit MetaspaceStep(const Members& step)
      : replacement_(step.string("replacement")),
        scheme_(step.string("prepend_scheme")),
        split_(step.boolean("split")) {
    if (to_characters(replacement_).size() != 1) step.refuse("replacement", "is not one character");
    if (scheme_ != "first" && scheme_ != "always" && scheme_ != "never") {
      step.refuse("prepend_scheme", "is " + quoted(scheme_) + ", which this library does not know");
    }
  }
  void run(Words& words) const override {
    for (Word& word : words.words) {
      std::string text;
      for (const char byte : word.text) byte == ' ' ? text.append(replacement_) : text.append(1, byte);
      const bool prepend = scheme_ == "always" || (scheme_ == "first" && word.at_start);
      if (prepend && text.compare(0, replacement_.size(), replacement_) != 0) text.insert(0, replacement_);
      word.text = words.strings.emplace_back(std::move(text));
    }
    if (!split_) return;
    std::size_t at = 0;
    const char32_t mark = next_character(replacement_, at);
    cut_characters(words, Behavior::kMergedWithNext, [mark](char32_t character) { return character == mark; });
  }

 private:
  const std::string replacement_, scheme_;
  const bool split_;
};

// \w+|[^\w\s]+, and nothing else.
class WhitespaceStep final : public PreTokenizer::Step {
 public:
  void run(Words& words) const override {
    cut(words, Behavior::kIsolated, [](std::string_view text, std::vector<Span>& spans) {
      spans.clear();
      int last = 0;
      for (std::size_t at = 0; at < text.size();) {
        const std::size_t start = at;
        const char32_t character = next_character(text, at);
        const int kind = is_word(character) ? 1 : is_white_space(character) ? 0 : 2;
        if (kind != 0 && kind == last) {
          spans.back().end = at;
        } else if (kind != 0) {
          spans.push_back({start, at, false});
        }
        last = kind;
      }
    });
  }
};

class FixedLengthStep final : public PreTokenizer::Step {
 public:
  explicit FixedLengthStep(const Members& step) : length_(step.integer("length", 1)) {}
  void run(Words& words) const override {
    cut(words, Behavior::kIsolated, [&](std::string_view text, std::vector<Span>& spans) {
      spans.clear();
      std::int64_t count = 0;
      std::size_t start = 0;
      for (std::size_t at = 0; at < text.size();) {
        next_character(text, at);
        if (++count < length_ && at < text.size()) continue;
        spans.push_back({start, at, false});
        start = at;
        count = 0;
      }
    });
  }

 private:
  const std::int64_t length_;
};

// A step that looks at single characters.
class CharacterStep final : public PreTokenizer::Step {
 public:
  using Found = bool (*)(char32_t);
  CharacterStep(Found found, Behavior behavior, char32_t other = 0)
      : found_(found), behavior_(behavior), other_(other) {}
  void run(Words& words) const override {
    cut_characters(words, behavior_,
                   [&](char32_t character) { return found_ == nullptr ? character == other_ : found_(character); });
  }

 private:
  const Found found_;
  const Behavior behavior_;
  const char32_t other_;
};

using Steps = std::vector<std::unique_ptr<const PreTokenizer::Step>>;

bool add_character_step(const std::string& type, const Members& step, Steps& steps) {
  const auto add = [&](CharacterStep::Found found, Behavior behavior, char32_t other = 0) {
    steps.push_back(std::make_unique<CharacterStep>(found, behavior, other));
    return true;
  };
  if (type == "Digits") {
    return add(is_rust_numeric, step.boolean("individual_digits") ? Behavior::kIsolated : Behavior::kContiguous);
  }
  if (type == "Punctuation") return add(is_rust_punctuation, read_behavior(step));
  if (type == "WhitespaceSplit") return add(is_white_space, Behavior::kRemoved);
  if (type == "BertPreTokenizer") {
    add(is_white_space, Behavior::kRemoved);
    return add(is_rust_punctuation, Behavior::kIsolated);
  }
  if (type == "CharDelimiterSplit") {
    const std::u32string delimiter = to_characters(step.string("delimiter"));
    if (delimiter.size() != 1) step.refuse("delimiter", "is not one character");
    return add(nullptr, Behavior::kRemoved, delimiter[0]);
  }
  return false;
}

// Characters of bytes, and bytes of characters.
struct ByteTable {
  ByteTable() {
    std::fill(std::begin(bytes), std::end(bytes), -1);
    char32_t next = 256;
    for (int byte = 0; byte < 256; ++byte) {
      const bool printable = (byte > 0x20 && byte < 0x7f) || (byte > 0xa0 && byte != 0xad);
      const char32_t character = printable ? static_cast<char32_t>(byte) : next++;
      append_utf8(characters[byte], character);
      bytes[character] = byte;
    }
  }
  std::array<std::string, 256> characters;
  int bytes[512];
};

const ByteTable& byte_table() {
  static const ByteTable table;
  return table;
}

}  // namespace

const std::string& byte_character(unsigned char byte) { return byte_table().characters[byte]; }
int byte_of_character(char32_t character) { return character < 512 ? byte_table().bytes[character] : -1; }

PreTokenizer::PreTokenizer(const Members& settings) {
  for (const Json& json : settings.array("pre_tokenizer")) {
    const Members step(json, settings.where() + ": a step of its pre_tokenizer", EDGELM_TOKENIZER);
    const std::string& type = step.string("type");
    if (add_character_step(type, step, steps_)) continue;
    if (type == "ByteLevel") {
      steps_.push_back(std::make_unique<ByteLevelStep>(step));
    } else if (type == "Split") {
      steps_.push_back(std::make_unique<SplitStep>(step));
    } else if (type == "Metaspace") {
      steps_.push_back(std::make_unique<MetaspaceStep>(step));
    } else if (type == "Whitespace") {
      steps_.push_back(std::make_unique<WhitespaceStep>());
    } else if (type == "FixedLength") {
      steps_.push_back(std::make_unique<FixedLengthStep>(step));
    } else {
      fail(EDGELM_TOKENIZER, settings.where(), ": its pre_tokenizer has the step ", quoted(type),
           ", which this library does not have");
    }
  }
}

PreTokenizer::~PreTokenizer() = default;

void PreTokenizer::run(Words& words) const {
  for (const auto& step : steps_) step->run(words);
}

}  // namespace edgelm::capi
