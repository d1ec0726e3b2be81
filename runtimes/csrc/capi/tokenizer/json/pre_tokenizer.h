// The steps of "pre_tokenizer" in tokenizer.edgelm.json: they cut a text into words, inside which tokens are merged.
#pragma once

#include <deque>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "capi/common/json.h"

namespace edgelm::capi {

struct Word {
  std::string_view text;
  bool at_start;  // of the text from which the words are
};

// Words, and the strings that they are views of. Deques do not move their strings.
struct Words {
  std::vector<Word> words;
  std::deque<std::string> strings;
};

class PreTokenizer {
 public:
  // "pre_tokenizer" of `settings`. Throws Error(EDGELM_TOKENIZER) that names what is not supported.
  explicit PreTokenizer(const Members& settings);
  ~PreTokenizer();

  // Replace all words by what they are cut into; `words` begins with the whole text.
  void run(Words& words) const;

  struct Step;

 private:
  std::vector<std::unique_ptr<const Step>> steps_;
};

// The bytes of a text as characters, each printable, and the way back: GPT-2's table.
const std::string& byte_character(unsigned char byte);
int byte_of_character(char32_t character);  // -1 if it stands for none

}  // namespace edgelm::capi
