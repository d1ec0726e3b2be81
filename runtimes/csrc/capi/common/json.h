// JSON values. Objects keep the order of their keys, as Python's do: chat templates write them.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "capi/common/error.h"

namespace edgelm::capi {

class Json {
 public:
  using Array = std::vector<Json>;
  using Member = std::pair<std::string, Json>;
  using Object = std::vector<Member>;  // if a key occurs twice, the last value, at the place of the first

  Json() = default;  // null
  Json(std::nullptr_t) {}
  Json(bool value) : value_(value) {}
  Json(int value) : value_(std::int64_t(value)) {}
  Json(std::int64_t value) : value_(value) {}
  Json(double value) : value_(value) {}
  Json(const char* value) : value_(std::string(value)) {}
  Json(std::string value) : value_(std::move(value)) {}
  Json(Array value) : value_(std::move(value)) {}
  Json(Object value) : value_(std::move(value)) {}

  // Parse a document: RFC 8259, with NaN and Infinity as Python reads them. Strings are valid UTF-8; a lone surrogate
  // escape is refused. Integers beyond 64 bits become doubles. Throws Error(code) with `where`, line and column. Nesting
  // is limited to 200. `unique`: a key that occurs twice is an error.
  static Json parse(std::string_view text, const std::string& where, edgelm_code code, bool unique = false);

  bool is_null() const { return value_.index() == 0; }
  bool is_bool() const { return std::holds_alternative<bool>(value_); }
  bool is_integer() const { return std::holds_alternative<std::int64_t>(value_); }
  bool is_double() const { return std::holds_alternative<double>(value_); }
  bool is_number() const { return is_integer() || is_double(); }
  bool is_string() const { return std::holds_alternative<std::string>(value_); }
  bool is_array() const { return std::holds_alternative<Array>(value_); }
  bool is_object() const { return std::holds_alternative<Object>(value_); }

  // The value; the caller has checked the type (std::bad_variant_access otherwise).
  bool boolean() const { return std::get<bool>(value_); }
  std::int64_t integer() const { return std::get<std::int64_t>(value_); }
  double number() const { return is_integer() ? double(integer()) : std::get<double>(value_); }
  const std::string& string() const { return std::get<std::string>(value_); }
  const Array& array() const { return std::get<Array>(value_); }
  Array& array() { return std::get<Array>(value_); }
  const Object& object() const { return std::get<Object>(value_); }
  Object& object() { return std::get<Object>(value_); }

  // A member of an object; nullptr if it is missing or this is no object.
  const Json* find(std::string_view key) const;
  // Set a member of an object; null becomes an object first.
  void set(std::string key, Json value);

  // The document as Python's json.dumps writes it: with `indent` < 0 separators ", " and ": ", otherwise `indent` spaces
  // for each level. Doubles are the shortest text that reads back the same ("0.1", "1e-05", "NaN"). Characters beyond
  // ASCII are kept.
  std::string dump(int indent = -1) const;

 private:
  std::variant<std::nullptr_t, bool, std::int64_t, double, std::string, Array, Object> value_ = nullptr;
};

// A double as Python's repr writes it: "1.0", "1e-05", "inf", "nan".
std::string python_repr(double value);

// A value as messages show it: short, and with "1" distinct from 1.
std::string shown(const Json& value);

// Typed access to an object's members with errors that name `where` and the key. `code` is that of the errors.
class Members {
 public:
  // Throws if `json` is no object.
  Members(const Json& json, std::string where, edgelm_code code);

  bool has(std::string_view key) const;        // present and not null
  const Json& at(std::string_view key) const;  // throws if missing
  const std::string& string(std::string_view key) const;
  std::int64_t integer(std::string_view key, std::int64_t least = INT64_MIN, std::int64_t most = INT64_MAX) const;
  double number(std::string_view key) const;
  bool boolean(std::string_view key) const;
  bool boolean(std::string_view key, bool otherwise) const;
  const Json::Array& array(std::string_view key) const;
  Members object(std::string_view key) const;
  [[noreturn]] void refuse(std::string_view key, const std::string& problem) const;  // "WHERE: OUTER.KEY PROBLEM"
  const std::string& where() const { return where_; }
  const Json& json() const { return json_; }

 private:
  const Json& json_;
  std::string where_, path_;  // path_: of the object in the document, with a dot at the end
  edgelm_code code_;
};

}  // namespace edgelm::capi
