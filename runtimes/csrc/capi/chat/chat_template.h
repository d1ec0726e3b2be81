// Chat templates: the part of Jinja that published templates use. Anything else is refused by name when a template is
// opened or, where that shows only then, when it runs. Results equal Python's (edgelm/tokenization/chat_template.py).
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "capi/common/json.h"

namespace edgelm::capi {

class ChatTemplate {
 public:
  // `special`: variables such as bos_token and eos_token. Throws Error(EDGELM_TEMPLATE) with line and reason.
  ChatTemplate(const std::string& source, std::vector<std::pair<std::string, std::string>> special);
  ~ChatTemplate();

  // Text of a conversation. `messages`: an array of objects with "role" and "content", checked as in Python; `variables`:
  // an object or null. Throws Error(EDGELM_INVALID_ARGUMENT) for malformed messages, Error(EDGELM_TEMPLATE) if the
  // template refuses them, fails, or exceeds a limit of steps or length. May be called from several threads.
  std::string render(const Json& messages, bool add_generation_prompt = true, const Json& variables = {}) const;

 private:
  struct Program;
  std::unique_ptr<const Program> program_;
  std::vector<std::pair<std::string, std::string>> special_;
};

}  // namespace edgelm::capi
