// Calls: arguments, methods, filters and tests.
#pragma once

#include <initializer_list>
#include <string>
#include <utility>
#include <vector>

#include "capi/chat/values/operations.h"
#include "capi/chat/values/value.h"

namespace edgelm::capi::chat {

struct Arguments {
  std::vector<Value> positional;
  std::vector<std::pair<std::string, Value>> named;
};

// The arguments of a function with these parameters, of which the first `required` must be given. As in Python, others
// are a TypeError.
class Parameters {
 public:
  Parameters(const char* function, const Arguments& given, std::initializer_list<const char*> names,
             std::size_t required, bool by_name = true);

  bool has(std::size_t place) const { return values_[place] != nullptr; }
  const Value& operator[](std::size_t place) const { return *values_[place]; }
  Value value(std::size_t place, Value otherwise) const { return has(place) ? *values_[place] : std::move(otherwise); }
  std::int64_t integer(std::size_t place, std::int64_t otherwise) const;
  bool truth(std::size_t place, bool otherwise) const;
  // A string argument of a string's method.
  const std::string& string(std::size_t place) const;
  bool none(std::size_t place) const { return !has(place) || values_[place]->is(Type::kNone); }

 private:
  const char* function_;
  std::vector<const Value*> values_;
};

Value call(const Value& function, Arguments& arguments);

// A filter or test; positional[0] is the value. An unknown one is an error.
Value apply_filter(const std::string& name, Arguments& arguments);
bool apply_test(const std::string& name, Arguments& arguments);

// value.name and value[index], as the sandbox of jinja2 gives them: what is missing or unsafe is undefined.
Value attribute_of(const Value& value, const std::string& name);
Value item_of(const Value& value, const Value& index);
// getattr(value, name). kUnsafe: there is one that templates may not use.
enum class Found { kMissing, kYes, kUnsafe };
Found find_attribute(const Value& value, const std::string& name, Value& attribute);

// A method of a string, list, tuple, dict or range.
using Method = Value (*)(const Value& self, Arguments& arguments);
Method string_method(const std::string& name);  // null where there is none
Method container_method(Type type, const std::string& name);

// str.format and str.format_map.
std::string braces_format(const std::string& format, const Arguments& arguments);

// Characters, as Python's methods of str ask.
bool all_characters(const std::string& text, bool (*is)(char32_t));
bool is_alphanumeric(char32_t character);
bool is_lower_text(const std::string& text);
bool is_upper_text(const std::string& text);
std::vector<Value> split_lines(const std::string& text, bool keep_ends);

// dict(...): of a mapping or pairs, and names.
Value dict_of(const Arguments& arguments, const char* function);

}  // namespace edgelm::capi::chat
