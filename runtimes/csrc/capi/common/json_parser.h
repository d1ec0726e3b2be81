// The parser of JSON documents: Json::parse.
#pragma once

#include "capi/common/json.h"

namespace edgelm::capi {

// A number in the form of JSON, in any locale; beyond the range of doubles 0 or infinite, as in Python.
double read_double(std::string_view text);

class JsonParser {
 public:
  JsonParser(std::string_view text, const std::string& where, edgelm_code code, bool unique)
      : text_(text), where_(where), code_(code), unique_(unique) {}
  Json document();

 private:
  [[noreturn]] void refuse(const std::string& problem) const;
  void skip_space();
  bool take(std::string_view word);
  char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }
  Json value();
  Json array();
  Json object();
  Json number();
  std::string string();
  void escape(std::string& result);
  unsigned hex4();
  void digits();
  void resolve_duplicates(Json::Object& members) const;

  std::string_view text_;
  const std::string& where_;
  edgelm_code code_;
  bool unique_;
  std::size_t at_ = 0;
  int depth_ = 0;
};

}  // namespace edgelm::capi
