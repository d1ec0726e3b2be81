#include "capi/common/json.h"

#include <charconv>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <locale>
#include <sstream>

#include "capi/common/json_parser.h"

namespace edgelm::capi {

namespace {

// The shortest digits that read back the same, as "d.ddde+x".
std::string shortest(double value) {
#if defined(__cpp_lib_to_chars) && __cpp_lib_to_chars >= 201611L
  char text[40];
  return {text, std::to_chars(text, text + sizeof text, value, std::chars_format::scientific).ptr};
#else
  for (int precision = 0;; ++precision) {
    std::ostringstream stream;
    stream.imbue(std::locale::classic());
    stream.precision(precision);
    stream << std::scientific << value;
    if (precision >= 16 || read_double(stream.str()) == value) return stream.str();
  }
#endif
}

void dump_string(std::string& text, const std::string& value) {
  text += '"';
  for (const char letter : value) {
    const unsigned char byte = static_cast<unsigned char>(letter);
    static const char names[] = "\b\t\n\f\r\"\\", escapes[] = "btnfr\"\\";
    const std::size_t at = byte == 0 ? std::string_view::npos : std::string_view(names).find(letter);
    if (at != std::string_view::npos) {
      text += '\\';
      text += escapes[at];
    } else if (byte < 0x20) {
      char escape[8];
      std::snprintf(escape, sizeof escape, "\\u%04x", byte);
      text += escape;
    } else {
      text += letter;
    }
  }
  text += '"';
}

// A document in the making, as json.dumps writes it.
struct Dump {
  std::string text;
  int indent;

  void line(int depth) { text.append(1, '\n').append(static_cast<std::size_t>(indent) * depth, ' '); }

  // What separates the elements of a list or an object.
  template <class Items, class Write>
  void items(const Items& all, char open, char close, int depth, const Write& write) {
    text += open;
    bool first = true;
    for (const auto& item : all) {
      if (!first) text += indent < 0 ? ", " : ",";
      if (indent >= 0) line(depth + 1);
      write(item);
      first = false;
    }
    if (indent >= 0 && !first) line(depth);
    text += close;
  }

  void value(const Json& json, int depth) {
    if (json.is_null()) {
      text += "null";
    } else if (json.is_bool()) {
      text += json.boolean() ? "true" : "false";
    } else if (json.is_integer()) {
      text += std::to_string(json.integer());
    } else if (json.is_double()) {
      const double number = json.number();
      text += std::isfinite(number) ? python_repr(number)
              : std::isnan(number)  ? "NaN"
              : number > 0          ? "Infinity"
                                    : "-Infinity";
    } else if (json.is_string()) {
      dump_string(text, json.string());
    } else if (json.is_array()) {
      items(json.array(), '[', ']', depth, [&](const Json& item) { value(item, depth + 1); });
    } else {
      items(json.object(), '{', '}', depth, [&](const Json::Member& member) {
        dump_string(text, member.first);
        text += ": ";
        value(member.second, depth + 1);
      });
    }
  }
};

}  // namespace

Json Json::parse(std::string_view text, const std::string& where, edgelm_code code, bool unique) {
  return JsonParser(text, where, code, unique).document();
}

const Json* Json::find(std::string_view key) const {
  if (!is_object()) return nullptr;
  for (const Member& member : object()) {
    if (member.first == key) return &member.second;
  }
  return nullptr;
}

void Json::set(std::string key, Json value) {
  if (is_null()) value_ = Object();
  for (Member& member : object()) {
    if (member.first == key) {
      member.second = std::move(value);
      return;
    }
  }
  object().emplace_back(std::move(key), std::move(value));
}

std::string Json::dump(int indent) const {
  Dump dump{{}, indent};
  dump.value(*this, 0);
  return std::move(dump.text);
}

std::string python_repr(double value) {
  if (std::isnan(value)) return "nan";
  if (std::isinf(value)) return value > 0 ? "inf" : "-inf";
  const std::string text = shortest(std::fabs(value));
  const std::size_t e = text.find('e');
  const int exponent = std::atoi(text.c_str() + e + 1);
  std::string digits = text.substr(0, 1) + (e > 2 ? text.substr(2, e - 2) : "");
  while (digits.size() > 1 && digits.back() == '0') digits.pop_back();
  const std::string sign = std::signbit(value) ? "-" : "";
  if (exponent < -4 || exponent >= 16) {
    char end[16];
    std::snprintf(end, sizeof end, "e%+03d", exponent);
    if (digits.size() > 1) digits.insert(1, 1, '.');
    return sign + digits + end;
  }
  if (exponent < 0) return sign + "0." + std::string(static_cast<std::size_t>(-exponent - 1), '0') + digits;
  const std::size_t whole = static_cast<std::size_t>(exponent) + 1;
  if (digits.size() < whole) digits.append(whole - digits.size(), '0');
  return sign + digits.substr(0, whole) + "." + (digits.size() > whole ? digits.substr(whole) : "0");
}

std::string shown(const Json& value) {
  if (value.is_string()) return quoted(value.string()) + " (a string)";
  if (value.is_array()) return "a list";
  if (value.is_object()) return "an object";
  return value.dump();
}

Members::Members(const Json& json, std::string where, edgelm_code code)
    : json_(json), where_(std::move(where)), code_(code) {
  if (!json.is_object()) fail(code, where_, ": it is ", shown(json), ", expected an object");
}

void Members::refuse(std::string_view key, const std::string& problem) const {
  fail(code_, where_, ": ", path_, key, " ", problem);
}

bool Members::has(std::string_view key) const {
  const Json* found = json_.find(key);
  return found != nullptr && !found->is_null();
}

const Json& Members::at(std::string_view key) const {
  const Json* found = json_.find(key);
  if (found == nullptr) refuse(key, "is missing");
  return *found;
}

const std::string& Members::string(std::string_view key) const {
  const Json& value = at(key);
  if (!value.is_string()) refuse(key, concat("is ", shown(value), ", expected a text"));
  return value.string();
}

std::int64_t Members::integer(std::string_view key, std::int64_t least, std::int64_t most) const {
  const Json& value = at(key);
  if (!value.is_integer() || value.integer() < least || value.integer() > most) {
    const std::string range = least == INT64_MIN && most == INT64_MAX ? ""
                              : most == INT64_MAX                     ? concat(" of ", least, " or more")
                                                                      : concat(" from ", least, " to ", most);
    refuse(key, concat("is ", shown(value), ", expected a whole number", range));
  }
  return value.integer();
}

double Members::number(std::string_view key) const {
  const Json& value = at(key);
  if (!value.is_number()) refuse(key, concat("is ", shown(value), ", expected a number"));
  return value.number();
}

bool Members::boolean(std::string_view key) const {
  const Json& value = at(key);
  if (!value.is_bool()) refuse(key, concat("is ", shown(value), ", expected true or false"));
  return value.boolean();
}

bool Members::boolean(std::string_view key, bool otherwise) const {
  return json_.find(key) == nullptr ? otherwise : boolean(key);
}

const Json::Array& Members::array(std::string_view key) const {
  const Json& value = at(key);
  if (!value.is_array()) refuse(key, concat("is ", shown(value), ", expected a list"));
  return value.array();
}

Members Members::object(std::string_view key) const {
  const Json& value = at(key);
  if (!value.is_object()) refuse(key, concat("is ", shown(value), ", expected an object"));
  Members inner(value, where_, code_);
  inner.path_ = concat(path_, key, ".");
  return inner;
}

}  // namespace edgelm::capi
