// Operations of Python on values.
#pragma once

#include <functional>
#include <string>

#include "capi/chat/values/value.h"

namespace edgelm::capi::chat {

// type(value).__name__.
std::string type_name(const Value& value);

bool truth(const Value& value);
bool equal(const Value& left, const Value& right);
bool same(const Value& left, const Value& right);  // `is`, where that does not depend on how Python keeps values
std::size_t hash_of(const Value& value);

enum class Order { kLess, kLessEqual, kGreater, kGreaterEqual };
bool ordered(const Value& left, const Value& right, Order order);
bool contains(const Value& container, const Value& item);

enum class Operator { kAdd, kSubtract, kMultiply, kDivide, kFloorDivide, kModulo, kPower };
Value calculate(Operator sign, const Value& left, const Value& right);
Value negative(const Value& value);
Value positive(const Value& value);

// len(value). False if it has none.
bool has_length(const Value& value, std::int64_t& length);
std::int64_t length_of(const Value& value);

// An integer argument: int or bool. Throws TypeError with `what` otherwise.
std::int64_t integer_of(const Value& value, const char* what = nullptr);

// The items of an iterable, one after another. Keeps the iterable alive.
class Cursor {
 public:
  explicit Cursor(const Value& iterable);  // TypeError if it is none
  Cursor() = default;
  bool next(Value& value);

 private:
  Value over_;
  std::size_t place_ = 0;
  std::int64_t count_ = -1;  // where known
};
bool is_iterable(const Value& value);
std::vector<Value> list_of(const Value& iterable);
Value iterator_of(const Value& iterable);  // iter(value): of type kIterator

// value[index] without attributes; false if Python raises TypeError or LookupError.
bool item_at(const Value& value, const Value& index, Value& item);
// value[start:stop:step]; a part may be none.
Value slice(const Value& value, const Value& start, const Value& stop, const Value& step);

// sorted(values, key=...), where `keys` are the keys.
std::vector<Value> sorted(std::vector<Value> values, const std::vector<Value>& keys, bool reverse);

// left % right for a string.
std::string percent_format(const std::string& format, const Value& right);
// format(value, spec) and str.format.
std::string format_value(const Value& value, const std::string& spec);

// Numbers as text and back. `read_integer` and `read_float` accept what Python's int() and float() do, in ASCII.
bool read_integer(std::string_view text, int base, Value& value);
bool read_float(std::string_view text, double& value);
// Digits after the point: "%.*f", "%.*e" and "%.*g", without the locale.
std::string printed(double value, char kind, int precision, bool alternate = false);
Value rounded(const Value& value, const Value& digits);

}  // namespace edgelm::capi::chat
