// Filters of lists and dicts.
#include <algorithm>

#include "capi/chat/render/filters.h"
#include "capi/chat/values/text.h"

namespace edgelm::capi::chat {

Path::Path(const Value& attribute) {
  if (attribute.is(Type::kNone)) return;
  if (!attribute.is_string()) {
    parts_.push_back(attribute);
    return;
  }
  const std::string& text = attribute.string();
  for (std::size_t begin = 0; begin <= text.size();) {
    const std::size_t end = std::min(text.find('.', begin), text.size());
    const std::string part = text.substr(begin, end - begin);
    Value number;
    const bool digits = !part.empty() && part.find_first_not_of("0123456789") == part.npos;
    parts_.push_back(digits && read_integer(part, 10, number) ? number : Value(part));
    begin = end + 1;
  }
}

Value Path::of(Value value, const Value* otherwise) const {
  for (const Value& part : parts_) {
    value = item_of(value, part);
    if (otherwise != nullptr && !otherwise->is(Type::kNone) && value.is_undefined()) value = *otherwise;
  }
  return value;
}

namespace {

Value attr(Arguments& given) {
  const Parameters arguments("attr", given, {"obj", "name"}, 2);
  if (!arguments[1].is_string()) raise_error("TypeError", "attribute name must be string");
  Value found;
  if (find_attribute(arguments[0], arguments[1].string(), found) == Found::kMissing) {
    return make_undefined(concat("'", type_name(arguments[0]), " object' has no attribute ", shown(arguments[1])));
  }
  return attribute_of(arguments[0], arguments[1].string());
}

Value dictsort(Arguments& given) {
  const Parameters arguments("dictsort", given, {"value", "case_sensitive", "by", "reverse"}, 1);
  const bool by_value = arguments.has(2) && equal(arguments[2], Value("value"));
  if (arguments.has(2) && !by_value && !equal(arguments[2], Value("key"))) {
    throw Failure(Failure::kFailed, "You can only sort by either \"key\" or \"value\"");
  }
  const Value& value = arguments[0];
  if (value.is_undefined()) value.as<Undefined>()->fail();
  if (!value.is(Type::kDict)) raise_error("AttributeError", "'", type_name(value), "' object has no attribute 'items'");
  Collector pairs, keys;
  for (const auto& [key, item] : value.as<Dict>()->entries) {
    pairs.add(make_tuple({key, item}));
    keys.add(arguments.truth(1, false) ? (by_value ? item : key) : without_case(by_value ? item : key));
  }
  return make_list(sorted(std::move(pairs.values), keys.values, arguments.truth(3, false)));
}

Value first(Arguments& given) {
  const Parameters arguments("first", given, {"seq"}, 1);
  Cursor cursor(arguments[0]);
  Value value;
  return cursor.next(value) ? value : make_undefined("No first item, sequence was empty.");
}

// reversed(value): whether Python can, and its items in that order.
bool reversed(const Value& value, std::vector<Value>& items) {
  if (value.is(Type::kIterator) || !is_iterable(value)) return false;
  items = list_of(value);
  std::reverse(items.begin(), items.end());
  return true;
}

Value last(Arguments& given) {
  const Parameters arguments("last", given, {"seq"}, 1);
  const Value& value = arguments[0];
  if (value.is_sequence() || value.is_string() || value.is(Type::kRange)) {
    Value item;
    if (item_at(value, Value(-1), item)) return item;
  } else {
    std::vector<Value> items;
    if (!reversed(value, items)) raise_error("TypeError", "'", type_name(value), "' object is not reversible");
    if (!items.empty()) return items[0];
  }
  return make_undefined("No last item, sequence was empty.");
}

Value reverse(Arguments& given) {
  const Parameters arguments("reverse", given, {"value"}, 1);
  const Value& value = arguments[0];
  if (value.is_string()) return slice(value, Value(), Value(), Value(-1));
  std::vector<Value> items;
  if (reversed(value, items)) return iterator_of(make_list(std::move(items)));
  if (!is_iterable(value)) throw Failure(Failure::kFailed, "argument must be iterable");
  items = list_of(value);
  std::reverse(items.begin(), items.end());
  return make_list(std::move(items));
}

Value join(Arguments& given) {
  const Parameters arguments("join", given, {"value", "d", "attribute"}, 1);
  const Value attribute = arguments.value(2, Value());
  const Path path(attribute);
  const std::string separator = arguments.has(1) ? text_of_value(arguments[1]) : "";
  if (!is_iterable(arguments[0])) {
    if (!attribute.is(Type::kNone)) raise_error("TypeError", "'", type_name(arguments[0]), "' object is not iterable");
    raise_error("TypeError", "can only join an iterable");
  }
  Cursor cursor(arguments[0]);
  Writer out;
  bool more = false;
  for (Value value; cursor.next(value); more = true) {
    if (more) out.add(separator);
    write_text(out, path.of(value));
  }
  return std::move(out.text);
}

Value length(Arguments& given) {
  const Parameters arguments("length", given, {"value"}, 1, false);
  return length_of(arguments[0]);
}

Value list(Arguments& given) {
  const Parameters arguments("list", given, {"value"}, 1);
  return make_list(list_of(arguments[0]));
}

Value extreme(Arguments& given, const char* name, Order order) {
  const Parameters arguments(name, given, {"value", "case_sensitive", "attribute"}, 1);
  const Path path(arguments.value(2, Value()));
  Cursor cursor(arguments[0]);
  Value best, best_key;
  bool found = false;
  for (Value value; cursor.next(value); found = true) {
    Value key = path.of(value);
    if (!arguments.truth(1, false)) key = without_case(key);
    if (found && !ordered(key, best_key, order)) continue;
    best = value;
    best_key = key;
  }
  return found ? best : make_undefined("No aggregated item, sequence was empty.");
}

Value sort(Arguments& given) {
  const Parameters arguments("sort", given, {"value", "reverse", "case_sensitive", "attribute"}, 1);
  std::vector<Path> paths;
  const Value attribute = arguments.value(3, Value());
  if (attribute.is_string()) {
    const std::string& text = attribute.string();
    for (std::size_t begin = 0; begin <= text.size();) {
      const std::size_t end = std::min(text.find(',', begin), text.size());
      paths.emplace_back(Value(text.substr(begin, end - begin)));
      begin = end + 1;
    }
  } else {
    paths.emplace_back(attribute);
  }
  const bool sensitive = arguments.truth(2, false);
  std::vector<Value> values = list_of(arguments[0]);
  Collector keys;
  for (const Value& value : values) {
    std::vector<Value> key;
    for (const Path& path : paths) key.push_back(sensitive ? path.of(value) : without_case(path.of(value)));
    keys.add(make_list(std::move(key)));
  }
  return make_list(sorted(std::move(values), keys.values, arguments.truth(1, false)));
}

Value groupby(Arguments& given) {
  const Parameters arguments("groupby", given, {"value", "attribute", "default", "case_sensitive"}, 2);
  const Path path(arguments[1]);
  const Value otherwise = arguments.value(2, Value());
  const bool sensitive = arguments.truth(3, false);
  const auto key_of = [&](const Value& value) {
    const Value key = path.of(value, &otherwise);
    return sensitive ? key : without_case(key);
  };
  std::vector<Value> values = list_of(arguments[0]);
  Collector keys, groups;
  for (const Value& value : values) keys.add(key_of(value));
  values = sorted(std::move(values), keys.values, false);
  for (std::size_t begin = 0, end = 0; begin < values.size(); begin = end) {
    const Value key = key_of(values[begin]);
    while (end < values.size() && (end == begin || equal(key_of(values[end]), key))) ++end;
    const Value name = path.of(values[begin], &otherwise);
    const Value group = make_list(
        {values.begin() + static_cast<std::ptrdiff_t>(begin), values.begin() + static_cast<std::ptrdiff_t>(end)});
    groups.add(Value(Type::kTuple, new Items({name, group}, true)));
  }
  return make_list(std::move(groups.values));
}

Value sum(Arguments& given) {
  const Parameters arguments("sum", given, {"iterable", "attribute", "start"}, 1);
  const Path path(arguments.value(1, Value()));
  Value total = arguments.value(2, Value(0));
  if (!is_iterable(arguments[0])) {
    raise_error("TypeError", "'", type_name(arguments[0]), "' object is not iterable");
  }
  if (total.is_string()) raise_error("TypeError", "sum() can't sum strings [use ''.join(seq) instead]");
  Cursor cursor(arguments[0]);
  for (Value value; cursor.next(value);) total = calculate(Operator::kAdd, total, path.of(value));
  return total;
}

}  // namespace

Filter item_filter(const std::string& name) {
  static const std::pair<const char*, Filter> filters[] = {
      {"attr", attr},
      {"count", length},
      {"dictsort", dictsort},
      {"first", first},
      {"groupby", groupby},
      {"join", join},
      {"last", last},
      {"length", length},
      {"list", list},
      {"max", [](Arguments& given) { return extreme(given, "max", Order::kGreater); }},
      {"min", [](Arguments& given) { return extreme(given, "min", Order::kLess); }},
      {"reverse", reverse},
      {"sort", sort},
      {"sum", sum},
  };
  for (const auto& [known, filter] : filters) {
    if (name == known) return filter;
  }
  return nullptr;
}

}  // namespace edgelm::capi::chat
