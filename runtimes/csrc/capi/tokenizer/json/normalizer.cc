#include "capi/tokenizer/json/normalizer.h"

#include "capi/common/error.h"
#include "capi/common/unicode.h"
#include "capi/tokenizer/json/pattern.h"

namespace edgelm::capi {

// One step. Each returns the changed text.
struct Normalizer::Step {
  virtual ~Step() = default;
  // `most`: bytes of the result; a step that may make many of few keeps to it itself.
  virtual std::string apply(std::string_view text, std::size_t most) const = 0;
};

namespace {

// Unicode's normal forms make a text at most 18 times as long, and replacements 16 times (checked at export).
constexpr std::size_t kMaxGrowth = 512, kMaxAdded = 1 << 20;

using Change = std::string (*)(std::string_view text);

std::string lower(std::string_view text) {
  std::u32string result;
  for (std::size_t at = 0; at < text.size();) append_lower(result, next_character(text, at));
  return to_utf8(result);
}

std::string without_accents(std::string_view text) {
  std::string result;
  for (std::size_t at = 0; at < text.size();) {
    const char32_t character = next_character(text, at);
    if (!is_stripped_mark(character)) append_utf8(result, character);
  }
  return result;
}

bool nmt_removes(char32_t character) {
  return (character >= 1 && character <= 8) || character == 0xb || (character >= 0xe && character <= 0x1f) ||
         character == 0x7f || character == 0x8f || character == 0x9f;
}

bool nmt_is_space(char32_t character) {
  return character == '\t' || character == '\n' || character == 0xc || character == '\r' || character == 0x1680 ||
         (character >= 0x200b && character <= 0x200f) || character == 0x2028 || character == 0x2029 ||
         character == 0x2581 || character == 0xfeff || character == 0xfffd;
}

std::string nmt(std::string_view text) {
  std::string result;
  for (std::size_t at = 0; at < text.size();) {
    const char32_t character = next_character(text, at);
    if (!nmt_removes(character)) append_utf8(result, nmt_is_space(character) ? U' ' : character);
  }
  return result;
}

template <Form form>
std::string in_form(std::string_view text) {
  return normalized(text, form);
}

Change simple_change(const std::string& type) {
  if (type == "NFC") return in_form<Form::NFC>;
  if (type == "NFD") return in_form<Form::NFD>;
  if (type == "NFKC") return in_form<Form::NFKC>;
  if (type == "NFKD") return in_form<Form::NFKD>;
  if (type == "Lowercase") return lower;
  if (type == "StripAccents") return without_accents;
  if (type == "Nmt") return nmt;
  return nullptr;
}

template <class Base>
struct SimpleStep : Base {
  explicit SimpleStep(Change function) : function(function) {}
  std::string apply(std::string_view text, std::size_t) const override { return function(text); }
  const Change function;
};

template <class Base>
struct ReplaceStep : Base {
  explicit ReplaceStep(const Members& step) : pattern(step), content(step.string("content")) {}
  std::string apply(std::string_view text, std::size_t most) const override {
    std::string result;
    std::size_t end = 0;
    for (const Regex::Match& match : pattern.find_all(text)) {
      result.append(text.substr(end, match.start - end)).append(content);
      end = match.end;
      if (result.size() > most) break;  // the caller refuses it
    }
    return result.append(text.substr(end));
  }
  const Pattern pattern;
  const std::string content;
};

template <class Base>
struct PrependStep : Base {
  explicit PrependStep(const Members& step) : content(step.string("prepend")) {}
  std::string apply(std::string_view text, std::size_t) const override {
    return text.empty() ? std::string() : content + std::string(text);
  }
  const std::string content;
};

template <class Base>
struct StripStep : Base {
  explicit StripStep(const Members& step) : left(step.boolean("strip_left")), right(step.boolean("strip_right")) {}
  std::string apply(std::string_view text, std::size_t) const override {
    std::size_t first = text.size(), end = 0;
    for (std::size_t at = 0; at < text.size();) {
      const std::size_t start = at;
      if (is_white_space(next_character(text, at))) continue;
      first = std::min(first, start);
      end = at;
    }
    if (!left) first = 0;
    if (!right) end = text.size();
    return std::string(first < end ? text.substr(first, end - first) : std::string_view());
  }
  const bool left, right;
};

}  // namespace

Normalizer::Normalizer(const Members& settings) {
  for (const Json& json : settings.array("normalizer")) {
    const Members step(json, settings.where() + ": a step of its normalizer", EDGELM_TOKENIZER);
    const std::string& type = step.string("type");
    if (const auto simple = simple_change(type)) {
      steps_.push_back(std::make_unique<SimpleStep<Step>>(simple));
    } else if (type == "Replace") {
      steps_.push_back(std::make_unique<ReplaceStep<Step>>(step));
    } else if (type == "Prepend") {
      steps_.push_back(std::make_unique<PrependStep<Step>>(step));
    } else if (type == "Strip") {
      steps_.push_back(std::make_unique<StripStep<Step>>(step));
    } else {
      fail(EDGELM_TOKENIZER, settings.where(), ": its normalizer has the step ", quoted(type),
           ", which this library does not have");
    }
  }
}

Normalizer::~Normalizer() = default;
Normalizer::Normalizer(Normalizer&&) noexcept = default;

std::string Normalizer::operator()(std::string_view text) const {
  std::string result(text);
  const std::size_t most = kMaxAdded + kMaxGrowth * text.size();
  for (const auto& step : steps_) {
    result = step->apply(result, most);
    if (result.size() > most) {
      fail(EDGELM_TOKENIZER, "the tokenizer's normalizer makes a text of ", text.size(), " bytes too long");
    }
  }
  return result;
}

}  // namespace edgelm::capi
