// The filters that templates have, by name. `positional[0]` is the value.
#pragma once

#include <string>

#include "capi/chat/render/call.h"

namespace edgelm::capi::chat {

using Filter = Value (*)(Arguments& arguments);

// Each looks in its own table; null where it has no such filter.
Filter text_filter(const std::string& name);
Filter item_filter(const std::string& name);
Filter lazy_filter(const std::string& name);

// Looks up an attribute as in `map(attribute="a.b")`: names and numbers between points.
class Path {
 public:
  explicit Path(const Value& attribute);
  Value of(Value value, const Value* otherwise = nullptr) const;

 private:
  std::vector<Value> parts_;
};

// A string in lower case; other values as they are.
Value without_case(const Value& value);

}  // namespace edgelm::capi::chat
