#include "capi/chat/values/operations.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "capi/chat/values/text.h"
#include "capi/common/unicode.h"

namespace edgelm::capi::chat {

std::string type_name(const Value& value) {
  switch (value.type()) {
    case Type::kNone: return "NoneType";
    case Type::kBool: return "bool";
    case Type::kInt: return "int";
    case Type::kFloat: return "float";
    case Type::kString: return value.as<Text>()->markup ? "Markup" : "str";
    case Type::kList: return "list";
    case Type::kTuple: return "tuple";
    case Type::kDict: return "dict";
    case Type::kRange: return "range";
    case Type::kView: {
      const View::Kind kind = value.as<View>()->kind;
      return kind == View::kKeys ? "dict_keys" : kind == View::kValues ? "dict_values" : "dict_items";
    }
    case Type::kIterator: return "generator";
    case Type::kUndefined: return "Undefined";
    case Type::kNamespace: return "Namespace";
    case Type::kOther: return value.as<Other>()->type_name();
  }
  return "object";
}

bool truth(const Value& value) {
  switch (value.type()) {
    case Type::kNone:
    case Type::kUndefined: return false;
    case Type::kBool:
    case Type::kInt: return value.integer() != 0;
    case Type::kFloat: return value.real() != 0;
    case Type::kIterator:
    case Type::kNamespace: return true;
    case Type::kOther: return value.as<Other>()->truth();
    default: return length_of(value) != 0;
  }
}

namespace {

enum class Relation { kLess, kEqual, kGreater, kUnordered };

Relation compared(double left, double right) {
  return left < right    ? Relation::kLess
         : left > right  ? Relation::kGreater
         : left == right ? Relation::kEqual
                         : Relation::kUnordered;
}

// Exactly, as Python does: an integer may have more digits than a double.
Relation compared(std::int64_t left, double right) {
  if (std::isnan(right)) return Relation::kUnordered;
  if (right >= 9223372036854775808.0) return Relation::kLess;
  if (right < -9223372036854775808.0) return Relation::kGreater;
  const auto whole = static_cast<std::int64_t>(right);
  if (left != whole) return left < whole ? Relation::kLess : Relation::kGreater;
  return compared(0.0, right - static_cast<double>(whole));
}

Relation compared(const Value& left, const Value& right) {
  if (left.is_integral() && right.is_integral()) {
    return left.integer() < right.integer()    ? Relation::kLess
           : left.integer() == right.integer() ? Relation::kEqual
                                               : Relation::kGreater;
  }
  if (left.is_integral()) return compared(left.integer(), right.real());
  if (!right.is_integral()) return compared(left.real(), right.real());
  const Relation other = compared(right.integer(), left.real());
  return other == Relation::kLess ? Relation::kGreater : other == Relation::kGreater ? Relation::kLess : other;
}

bool equal_items(const std::vector<Value>& left, const std::vector<Value>& right) {
  if (left.size() != right.size()) return false;
  for (std::size_t i = 0; i < left.size(); ++i) {
    if (!equal(left[i], right[i])) return false;
  }
  return true;
}

bool equal_dicts(const Dict& left, const Dict& right) {
  if (left.entries.size() != right.entries.size()) return false;
  for (const auto& [key, value] : left.entries) {
    const Value* other = right.find(key);
    if (other == nullptr || !equal(value, *other)) return false;
  }
  return true;
}

bool equal_ranges(const Range& left, const Range& right) {
  const std::int64_t size = left.size();
  return size == right.size() && (size == 0 || (left.start == right.start && (size == 1 || left.step == right.step)));
}

}  // namespace

bool equal(const Value& left, const Value& right) {
  limits().step();
  if (left.is_number() && right.is_number()) return compared(left, right) == Relation::kEqual;
  if (left.type() != right.type()) return false;
  if (left.is(Type::kNone) || left.is_undefined()) return true;
  if (left.object() == right.object()) return true;
  switch (left.type()) {
    case Type::kString:
      limits().copy(std::min(left.string().size(), right.string().size()));
      return left.string() == right.string();
    case Type::kList:
    case Type::kTuple: return equal_items(left.items(), right.items());
    case Type::kDict: return equal_dicts(*left.as<Dict>(), *right.as<Dict>());
    case Type::kRange: return equal_ranges(*left.as<Range>(), *right.as<Range>());
    case Type::kView: unsupported("the comparison of what keys(), values() or items() returned; add the filter list");
    default: return false;
  }
}

bool same(const Value& left, const Value& right) {
  if (left.type() != right.type()) return false;
  if (left.is(Type::kNone)) return true;
  if (left.is(Type::kBool)) return left.boolean() == right.boolean();
  if (left.is_number() || left.is_string() || left.is(Type::kTuple)) {
    unsupported("the test sameas for values of type ", type_name(left), ", which depends on how Python keeps them");
  }
  return left.object() == right.object();
}

std::size_t hash_of(const Value& value) {
  limits().step();
  const auto mixed = [](std::uint64_t bits) {
    bits = (bits ^ (bits >> 32)) * 0x9E3779B97F4A7C15u;
    return static_cast<std::size_t>(bits ^ (bits >> 29));
  };
  switch (value.type()) {
    case Type::kNone: return 7;
    case Type::kBool:
    case Type::kInt: return mixed(static_cast<std::uint64_t>(value.integer()));
    case Type::kFloat: {
      const double real = value.real();
      if (real >= -9.2e18 && real <= 9.2e18 && real == std::trunc(real)) {
        return mixed(static_cast<std::uint64_t>(static_cast<std::int64_t>(real)));
      }
      return std::hash<double>()(real);
    }
    case Type::kString: limits().copy(value.string().size()); return std::hash<std::string>()(value.string());
    case Type::kTuple: {
      std::size_t hash = 0x345678;
      for (const Value& item : value.items()) hash = mixed(hash * 1000003 + hash_of(item));
      return hash;
    }
    case Type::kRange: return static_cast<std::size_t>(value.as<Range>()->size());
    case Type::kList:
    case Type::kDict: raise_error("TypeError", "unhashable type: '", type_name(value), "'");
    case Type::kView: unsupported("a dict's key that keys(), values() or items() returned");
    case Type::kUndefined: return 11;
    default: return std::hash<const void*>()(value.object());
  }
}

bool ordered(const Value& left, const Value& right, Order order) {
  limits().step();
  Relation relation;
  if (left.is_number() && right.is_number()) {
    relation = compared(left, right);
  } else if (left.is_string() && right.is_string()) {
    limits().copy(std::min(left.string().size(), right.string().size()));
    const int sign = left.string().compare(right.string());
    relation = sign < 0 ? Relation::kLess : sign > 0 ? Relation::kGreater : Relation::kEqual;
  } else if (left.is_sequence() && left.type() == right.type()) {
    const auto &a = left.items(), &b = right.items();
    std::size_t i = 0;
    while (i < a.size() && i < b.size() && equal(a[i], b[i])) ++i;
    if (i < a.size() && i < b.size()) return ordered(a[i], b[i], order);
    relation = a.size() < b.size() ? Relation::kLess : a.size() > b.size() ? Relation::kGreater : Relation::kEqual;
  } else {
    for (const Value* side : {&left, &right}) {
      if (side->is_undefined()) side->as<Undefined>()->fail();
      if (side->is(Type::kView)) unsupported("the comparison of what keys(), values() or items() returned");
    }
    static const char* const names[] = {"<", "<=", ">", ">="};
    raise_error("TypeError", "'", names[static_cast<int>(order)], "' not supported between instances of '",
                type_name(left), "' and '", type_name(right), "'");
  }
  switch (order) {
    case Order::kLess: return relation == Relation::kLess;
    case Order::kLessEqual: return relation == Relation::kLess || relation == Relation::kEqual;
    case Order::kGreater: return relation == Relation::kGreater;
    default: return relation == Relation::kGreater || relation == Relation::kEqual;
  }
}

bool contains(const Value& container, const Value& item) {
  switch (container.type()) {
    case Type::kString:
      if (!item.is_string()) {
        raise_error("TypeError", "'in <string>' requires string as left operand, not ", type_name(item));
      }
      limits().copy(container.string().size());
      return container.string().find(item.string()) != std::string::npos;
    case Type::kDict: return container.as<Dict>()->find(item) != nullptr;
    case Type::kView:
      if (container.as<View>()->kind == View::kKeys) return contains(container.as<View>()->dict, item);
      break;
    case Type::kRange: {
      const Range& range = *container.as<Range>();
      if (!item.is_number()) return false;
      const double real = item.real();
      if (item.is(Type::kFloat) && (real != std::trunc(real) || std::fabs(real) > 9e18)) return false;
      const std::int64_t number = item.is_integral() ? item.integer() : static_cast<std::int64_t>(real);
      const bool within = range.step > 0 ? number >= range.start && number < range.stop
                                         : number <= range.start && number > range.stop;
      return within && (number - range.start) % range.step == 0;
    }
    default: break;
  }
  if (!is_iterable(container)) {
    raise_error("TypeError", "argument of type '", type_name(container), "' is not iterable");
  }
  Cursor cursor(container);
  for (Value one; cursor.next(one);) {
    if (equal(one, item)) return true;
  }
  return false;
}

bool has_length(const Value& value, std::int64_t& length) {
  switch (value.type()) {
    case Type::kString: length = static_cast<std::int64_t>(value.as<Text>()->length()); return true;
    case Type::kList:
    case Type::kTuple: length = static_cast<std::int64_t>(value.items().size()); return true;
    case Type::kDict: length = static_cast<std::int64_t>(value.as<Dict>()->entries.size()); return true;
    case Type::kRange: length = value.as<Range>()->size(); return true;
    case Type::kView: length = static_cast<std::int64_t>(value.as<View>()->size()); return true;
    case Type::kUndefined: length = 0; return true;
    case Type::kOther: return value.as<Other>()->length(length);
    default: return false;
  }
}

std::int64_t length_of(const Value& value) {
  std::int64_t length = 0;
  if (!has_length(value, length)) raise_error("TypeError", "object of type '", type_name(value), "' has no len()");
  return length;
}

std::int64_t integer_of(const Value& value, const char* what) {
  if (value.is_integral()) return value.integer();
  if (what != nullptr) raise_error("TypeError", what);
  raise_error("TypeError", "'", type_name(value), "' object cannot be interpreted as an integer");
}

bool is_iterable(const Value& value) {
  switch (value.type()) {
    case Type::kString:
    case Type::kList:
    case Type::kTuple:
    case Type::kDict:
    case Type::kRange:
    case Type::kView:
    case Type::kIterator:
    case Type::kUndefined: return true;
    default: return false;
  }
}

Cursor::Cursor(const Value& iterable) : over_(iterable) {
  if (!is_iterable(iterable)) raise_error("TypeError", "'", type_name(iterable), "' object is not iterable");
  if (!iterable.is(Type::kIterator) && !iterable.is_string()) count_ = length_of(iterable);
}

bool Cursor::next(Value& value) {
  limits().step();
  if (over_.is_string()) {
    const Text& text = *over_.as<Text>();
    if (place_ >= text.bytes.size()) return false;
    const std::size_t from = place_;
    next_character(text.bytes, place_);
    value = make_string(text.bytes.substr(from, place_ - from), text.markup);
    return true;
  }
  if (over_.is(Type::kIterator)) return over_.as<Iterator>()->next(value);
  if (static_cast<std::int64_t>(place_) >= count_) return false;
  const std::size_t place = place_++;
  if (over_.is(Type::kDict)) {
    value = over_.as<Dict>()->entries[place].first;
  } else if (over_.is(Type::kRange)) {
    value = over_.as<Range>()->at(static_cast<std::int64_t>(place));
  } else if (over_.is(Type::kView)) {
    value = over_.as<View>()->at(place);
  } else {
    value = over_.items()[place];
  }
  return true;
}

std::vector<Value> list_of(const Value& iterable) {
  if (iterable.is_sequence()) {
    limits().check(iterable.items().size() * sizeof(Value));
    limits().step(iterable.items().size());
    return iterable.items();
  }
  Cursor cursor(iterable);
  Collector all;
  for (Value value; cursor.next(value);) all.add(value);
  return std::move(all.values);
}

namespace {

struct CursorIterator : Iterator {
  explicit CursorIterator(const Value& iterable) : cursor(iterable) {
    above(iterable);
    hold(sizeof(CursorIterator));
  }
  bool next(Value& value) override { return cursor.next(value); }
  Cursor cursor;
};

}  // namespace

Value iterator_of(const Value& iterable) {
  if (iterable.is(Type::kIterator)) return iterable;
  return Value(Type::kIterator, new CursorIterator(iterable));
}

bool item_at(const Value& value, const Value& index, Value& item) {
  if (value.is_undefined()) value.as<Undefined>()->fail();
  if (value.is(Type::kDict)) {
    if (index.is(Type::kList) || index.is(Type::kDict) || index.is(Type::kView)) return false;
    const Value* found = value.as<Dict>()->find(index);
    if (found != nullptr) item = *found;
    return found != nullptr;
  }
  if (!index.is_integral() || !(value.is_sequence() || value.is_string() || value.is(Type::kRange))) return false;
  const std::int64_t length = length_of(value);
  std::int64_t place = index.integer();
  if (place < 0) place += length;
  if (place < 0 || place >= length) return false;
  if (value.is_string()) {
    item = make_string(character_at(*value.as<Text>(), static_cast<std::size_t>(place)), value.as<Text>()->markup);
  } else if (value.is(Type::kRange)) {
    item = value.as<Range>()->at(place);
  } else {
    item = value.items()[static_cast<std::size_t>(place)];
  }
  return true;
}

namespace {

std::int64_t bound(const Value& value, std::int64_t length, std::int64_t step, std::int64_t otherwise) {
  if (value.is(Type::kNone)) return otherwise;
  std::int64_t place = integer_of(value, "slice indices must be integers or None or have an __index__ method");
  if (place < 0) return place < -length ? (step < 0 ? -1 : 0) : place + length;
  return place >= length ? (step < 0 ? length - 1 : length) : place;
}

}  // namespace

Value slice(const Value& value, const Value& start, const Value& stop, const Value& step) {
  if (value.is_undefined()) value.as<Undefined>()->fail();
  if (value.is(Type::kDict)) raise_error("TypeError", "unhashable type: 'slice'");
  if (!value.is_sequence() && !value.is_string() && !value.is(Type::kRange)) {
    raise_error("TypeError", "'", type_name(value), "' object is not subscriptable");
  }
  const std::int64_t pace = step.is(Type::kNone)
                                ? 1
                                : std::max<std::int64_t>(
                                      integer_of(step,
                                                 "slice indices must be integers or None or have an __index__ method"),
                                      -INT64_MAX);
  if (pace == 0) raise_error("ValueError", "slice step cannot be zero");
  const std::int64_t length = length_of(value);
  const std::int64_t from = bound(start, length, pace, pace < 0 ? length - 1 : 0);
  const std::int64_t to = bound(stop, length, pace, pace < 0 ? -1 : length);
  if (value.is_string()) return make_string(sliced(*value.as<Text>(), from, to, pace), value.as<Text>()->markup);
  const Range places(from, to, pace);
  const std::int64_t count = places.size();
  if (value.is(Type::kRange)) {
    const Range& range = *value.as<Range>();
    if (range.step > INT32_MAX || range.step < INT32_MIN || pace > INT32_MAX || pace < INT32_MIN) {
      unsupported("a slice of a range with steps beyond 32 bits");
    }
    return Value(Type::kRange,
                 new Range(range.start + from * range.step, range.start + to * range.step, range.step * pace));
  }
  limits().check(static_cast<std::size_t>(count) * sizeof(Value));
  limits().step(static_cast<std::size_t>(count));
  std::vector<Value> items;
  items.reserve(static_cast<std::size_t>(count));
  for (std::int64_t i = 0; i < count; ++i) items.push_back(value.items()[static_cast<std::size_t>(from + i * pace)]);
  return value.is(Type::kList) ? make_list(std::move(items)) : make_tuple(std::move(items));
}

std::vector<Value> sorted(std::vector<Value> values, const std::vector<Value>& keys, bool reverse) {
  // A merge sort, which calls "<" as Python's does and stays within its memory whatever the order says.
  const auto before = [&](std::size_t a, std::size_t b) {
    return reverse ? ordered(keys[b], keys[a], Order::kLess) : ordered(keys[a], keys[b], Order::kLess);
  };
  limits().check(values.size() * (sizeof(Value) + 2 * sizeof(std::size_t)));
  std::vector<std::size_t> order(values.size()), merged(values.size());
  std::iota(order.begin(), order.end(), std::size_t(0));
  for (std::size_t width = 1; width < order.size(); width *= 2) {
    for (std::size_t begin = 0; begin < order.size(); begin += 2 * width) {
      std::size_t left = begin, right = std::min(begin + width, order.size());
      const std::size_t middle = right, end = std::min(begin + 2 * width, order.size());
      for (std::size_t i = begin; i < end; ++i) {
        const bool from_right = left == middle || (right < end && before(order[right], order[left]));
        merged[i] = from_right ? order[right++] : order[left++];
      }
    }
    order.swap(merged);
  }
  std::vector<Value> result;
  result.reserve(values.size());
  for (const std::size_t place : order) result.push_back(std::move(values[place]));
  return result;
}

}  // namespace edgelm::capi::chat
