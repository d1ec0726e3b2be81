// json.dumps.
#include <cmath>
#include <cstdio>

#include "capi/chat/values/operations.h"
#include "capi/chat/values/text.h"
#include "capi/common/json.h"
#include "capi/common/unicode.h"

namespace edgelm::capi::chat {

namespace {

struct Dump {
  Writer out;
  bool ascii;
  const std::string* indent;
  std::string item_separator, key_separator;
  bool sort;

  void line(int depth) {
    if (indent == nullptr) return;
    out.add("\n");
    out.repeat(*indent, static_cast<std::size_t>(depth));
  }

  void unit(unsigned code) {
    char escape[8];
    std::snprintf(escape, sizeof escape, "\\u%04x", code & 0xFFFF);
    out.add(escape);
  }

  void string(std::string_view text) {
    out.add("\"");
    std::size_t kept = 0;
    for (std::size_t at = 0; at < text.size();) {
      const std::size_t from = at;
      const char32_t character = next_character(text, at);
      if (character >= 0x20 && character != '"' && character != '\\' && (character < 0x7F || !ascii)) continue;
      out.add(text.substr(kept, from - kept));
      kept = at;
      escape(character);
    }
    out.add(text.substr(kept)).add("\"");
  }

  void escape(char32_t character) {
    static const char names[] = "\b\t\n\f\r\"\\", letters[] = "btnfr\"\\";
    for (std::size_t i = 0; i < sizeof names - 1; ++i) {
      if (character == static_cast<unsigned char>(names[i])) {
        out.add("\\").add(std::string_view(letters + i, 1));
        return;
      }
    }
    if (character >= 0x10000) {
      unit(0xD800 + ((static_cast<unsigned>(character) - 0x10000) >> 10));
      unit(0xDC00 + ((static_cast<unsigned>(character) - 0x10000) & 0x3FF));
    } else {
      unit(static_cast<unsigned>(character));
    }
  }

  std::string number(const Value& value) {
    switch (value.type()) {
      case Type::kNone: return "null";
      case Type::kBool: return value.boolean() ? "true" : "false";
      case Type::kInt: return std::to_string(value.integer());
      default: {
        const double real = value.real();
        if (std::isnan(real)) return "NaN";
        if (std::isinf(real)) return real > 0 ? "Infinity" : "-Infinity";
        return python_repr(real);
      }
    }
  }

  void key(const Value& value) {
    if (value.is_string()) return string(value.string());
    if (!value.is_number() && !value.is(Type::kNone)) {
      raise_error("TypeError", "keys must be str, int, float, bool or None, not ", type_name(value));
    }
    string(number(value));
  }

  void items(const std::vector<Value>& values, int depth) {
    if (values.empty()) {
      out.add("[]");
      return;
    }
    out.add("[");
    for (std::size_t i = 0; i < values.size(); ++i) {
      if (i > 0) out.add(item_separator);
      line(depth + 1);
      value(values[i], depth + 1);
    }
    line(depth);
    out.add("]");
  }

  void dict(const Dict& dict, int depth) {
    if (dict.entries.empty()) {
      out.add("{}");
      return;
    }
    std::vector<Value> pairs;
    if (sort) {
      Collector all;
      std::vector<Value> keys;
      for (const auto& [name, item] : dict.entries) {
        keys.push_back(name);
        all.add(make_tuple({name, item}));
      }
      pairs = sorted(std::move(all.values), keys, false);
    }
    out.add("{");
    for (std::size_t i = 0; i < dict.entries.size(); ++i) {
      if (i > 0) out.add(item_separator);
      line(depth + 1);
      const auto& [name, item] = dict.entries[i];
      key(sort ? pairs[i].items()[0] : name);
      out.add(key_separator);
      value(sort ? pairs[i].items()[1] : item, depth + 1);
    }
    line(depth);
    out.add("}");
  }

  void value(const Value& value, int depth) {
    const Level level;
    limits().step();
    if (value.is_string()) return string(value.string());
    if (value.is_sequence()) return items(value.items(), depth);
    if (value.is(Type::kDict)) return dict(*value.as<Dict>(), depth);
    if (value.is_object()) raise_error("TypeError", "Object of type ", type_name(value), " is not JSON serializable");
    out.add(number(value));
  }
};

}  // namespace

std::string json_text(const Value& value, bool ascii, const std::string* indent, const std::string& item_separator,
                      const std::string& key_separator, bool sort) {
  Dump dump{{}, ascii, indent, item_separator, key_separator, sort};
  dump.value(value, 0);
  return std::move(dump.out.text);
}

}  // namespace edgelm::capi::chat
