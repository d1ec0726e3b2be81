// What the steps Replace and Split search for: a string, or a regular expression.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "capi/common/json.h"
#include "capi/tokenizer/regex/regex.h"

namespace edgelm::capi {

class Pattern {
 public:
  // "pattern" of a step: {"String": text} or {"Regex": text}. Throws Error(EDGELM_TOKENIZER).
  explicit Pattern(const Members& step) {
    const Members pattern = step.object("pattern");
    if (pattern.has("String")) {
      text_ = pattern.string("String");
      if (text_.empty()) regex_.emplace("");
    } else {
      regex_.emplace(pattern.string("Regex"));
    }
  }

  std::vector<Regex::Match> find_all(std::string_view text) const {
    if (regex_) return regex_->find_all(text);
    std::vector<Regex::Match> result;
    for (std::size_t at = 0; (at = text.find(text_, at)) != std::string_view::npos; at += text_.size()) {
      result.push_back({at, at + text_.size()});
    }
    return result;
  }

 private:
  std::string text_;
  std::optional<Regex> regex_;
};

}  // namespace edgelm::capi
