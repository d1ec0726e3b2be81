// Filters that are generators in jinja2: they do nothing before their items are asked for, and give them once.
#include <algorithm>
#include <optional>

#include "capi/chat/render/filters.h"
#include "capi/chat/syntax/names.h"
#include "capi/chat/values/text.h"

namespace edgelm::capi::chat {

namespace {

// A generator over the items of a value.
struct Generator : Iterator {
  explicit Generator(Arguments given) : given(std::move(given)) {
    for (const Value& value : this->given.positional) above(value);
    hold(sizeof(Generator) + this->given.positional.size() * sizeof(Value));
  }
  bool next(Value& value) final {
    const Level level;
    if (ended) return false;
    try {
      if (!started) {
        started = true;
        start();
      }
      ended = ended || !produce(value);
    } catch (...) {
      ended = true;
      throw;
    }
    return !ended;
  }
  virtual void start() = 0;
  virtual bool produce(Value& value) = 0;

  Arguments given;
  bool started = false, ended = false;
  std::optional<Cursor> cursor;
};

template <class Kind>
Value lazy(Arguments& given) {
  return Value(Type::kIterator, new Kind(std::move(given)));
}

struct Map : Generator {
  using Generator::Generator;
  void start() override {
    if (!truth(given.positional[0])) {
      ended = true;
      return;
    }
    std::vector<std::pair<std::string, Value>> others;
    if (given.positional.size() == 1) {
      for (auto& [name, value] : given.named) {
        if (name == "attribute") path.emplace(value);
        else if (name == "default") otherwise = value;
        else others.emplace_back(name, value);
      }
      if (!path) throw Failure(Failure::kFailed, "map requires a filter argument");
      if (!others.empty()) {
        throw Failure(Failure::kFailed, concat("Unexpected keyword argument '", others[0].first, "'"));
      }
    }
    cursor.emplace(given.positional[0]);
  }
  bool produce(Value& value) override {
    if (ended || !cursor->next(value)) return false;
    if (path) {
      value = path->of(value, &otherwise);
      return true;
    }
    Arguments arguments{{value}, given.named};
    arguments.positional.insert(arguments.positional.end(), given.positional.begin() + 2, given.positional.end());
    const Value& name = given.positional[1];
    if (!name.is_string()) throw Failure(Failure::kFailed, concat("No filter named ", shown(name), "."));
    value = apply_filter(name.string(), arguments);
    return true;
  }
  std::optional<Path> path;
  Value otherwise;
};

struct Select : Generator {
  Select(Arguments given, bool reject, bool attribute)
      : Generator(std::move(given)), reject(reject), attribute(attribute) {}
  void start() override {
    if (!truth(given.positional[0])) {
      ended = true;
      return;
    }
    if (attribute) {
      if (given.positional.size() < 2) throw Failure(Failure::kFailed, "Missing parameter for attribute name");
      path.emplace(given.positional[1]);
    }
    cursor.emplace(given.positional[0]);
  }
  bool produce(Value& value) override {
    if (ended) return false;
    while (cursor->next(value)) {
      if (chosen(value) != reject) return true;
    }
    return false;
  }
  bool chosen(const Value& value) {
    const Value tested = path ? path->of(value) : value;
    const std::size_t place = attribute ? 2 : 1;
    if (given.positional.size() <= place) return truth(tested);
    Arguments arguments{{tested}, given.named};
    arguments.positional.insert(arguments.positional.end(),
                                given.positional.begin() + static_cast<std::ptrdiff_t>(place) + 1,
                                given.positional.end());
    const Value& name = given.positional[place];
    if (!name.is_string()) throw Failure(Failure::kFailed, concat("No test named ", shown(name), "."));
    return apply_test(name.string(), arguments);
  }
  const bool reject, attribute;
  std::optional<Path> path;
};

template <bool reject, bool attribute>
Value select(Arguments& given) {
  return Value(Type::kIterator, new Select(std::move(given), reject, attribute));
}

// Generators whose arguments have names. These are checked at once, as Python does.
struct Unique : Generator {
  Unique(Arguments all, bool sensitive, const Value& attribute)
      : Generator(std::move(all)), sensitive(sensitive), path(attribute), seen(make_dict()) {}
  void start() override { cursor.emplace(given.positional[0]); }
  bool produce(Value& value) override {
    while (cursor->next(value)) {
      Value key = path.of(value);
      if (!sensitive) key = without_case(key);
      Dict& dict = *seen.as<Dict>();
      if (dict.find(key) != nullptr) continue;
      dict.set(key, Value());
      return true;
    }
    return false;
  }
  const bool sensitive;
  const Path path;
  const Value seen;
};

Value unique(Arguments& given) {
  const Parameters arguments("unique", given, {"value", "case_sensitive", "attribute"}, 1);
  return Value(Type::kIterator,
               new Unique({{arguments[0]}, {}}, arguments.truth(1, false), arguments.value(2, Value())));
}

struct Batch : Generator {
  using Generator::Generator;
  void start() override { cursor.emplace(given.positional[0]); }
  bool produce(Value& value) override {
    const Value &size = given.positional[1], &fill = given.positional[2];
    Collector batch;
    if (carried) batch.add(*carried);
    carried.reset();
    for (Value item; cursor->next(item);) {
      if (equal(Value(static_cast<std::int64_t>(batch.values.size())), size)) {
        carried = item;
        value = make_list(std::move(batch.values));
        return true;
      }
      batch.add(item);
    }
    if (batch.values.empty()) return false;
    if (!fill.is(Type::kNone)) {
      const Value missing = calculate(Operator::kSubtract, size, Value(static_cast<std::int64_t>(batch.values.size())));
      for (std::int64_t i = integer_of(missing); i > 0; --i) batch.add(fill);
    }
    value = make_list(std::move(batch.values));
    return true;
  }
  std::optional<Value> carried;
};

Value batch(Arguments& given) {
  const Parameters arguments("batch", given, {"value", "linecount", "fill_with"}, 2);
  Arguments all{{arguments[0], arguments[1], arguments.value(2, Value())}, {}};
  return lazy<Batch>(all);
}

struct Slices : Generator {
  using Generator::Generator;
  void start() override {
    items = list_of(given.positional[0]);
    const auto length = static_cast<std::int64_t>(items.size());
    const Value& slices = given.positional[1];
    size = integer_of(calculate(Operator::kFloorDivide, Value(length), slices));
    extra = integer_of(calculate(Operator::kModulo, Value(length), slices));
    count = integer_of(slices);
  }
  bool produce(Value& value) override {
    if (number >= count) return false;
    const std::int64_t begin = offset + number * size;
    if (number < extra) ++offset;
    const std::int64_t end = std::min<std::int64_t>(offset + (number + 1) * size,
                                                    static_cast<std::int64_t>(items.size()));
    Collector part;
    for (std::int64_t i = begin; i < end; ++i) part.add(items[static_cast<std::size_t>(i)]);
    const Value& fill = given.positional[2];
    if (!fill.is(Type::kNone) && number >= extra) part.add(fill);
    ++number;
    value = make_list(std::move(part.values));
    return true;
  }
  std::vector<Value> items;
  std::int64_t size = 0, extra = 0, count = 0, number = 0, offset = 0;
};

Value slices(Arguments& given) {
  const Parameters arguments("slice", given, {"value", "slices", "fill_with"}, 2);
  Arguments all{{arguments[0], arguments[1], arguments.value(2, Value())}, {}};
  return lazy<Slices>(all);
}

struct Pairs : Generator {
  using Generator::Generator;
  void start() override {
    const Value& value = given.positional[0];
    if (value.is_undefined()) {
      ended = true;
      return;
    }
    if (!value.is(Type::kDict)) raise_error("TypeError", "Can only get item pairs from a mapping.");
    cursor.emplace(Value(Type::kView, new View(View::kItems, value)));
  }
  bool produce(Value& value) override { return !ended && cursor->next(value); }
};

Value items(Arguments& given) {
  const Parameters arguments("items", given, {"value"}, 1);
  Arguments all{{arguments[0]}, {}};
  return lazy<Pairs>(all);
}

}  // namespace

Filter lazy_filter(const std::string& name) {
  static const std::pair<const char*, Filter> filters[] = {
      {"batch", batch},
      {"items", items},
      {"map", lazy<Map>},
      {"reject", select<true, false>},
      {"rejectattr", select<true, true>},
      {"select", select<false, false>},
      {"selectattr", select<false, true>},
      {"slice", slices},
      {"unique", unique},
  };
  for (const auto& [known, filter] : filters) {
    if (name == known) return filter;
  }
  return nullptr;
}

Value apply_filter(const std::string& name, Arguments& arguments) {
  for (const auto find : {text_filter, item_filter, lazy_filter}) {
    if (const Filter filter = find(name)) return filter(arguments);
  }
  if (filter_named(name) != Known::kMissing) unsupported("the filter ", name);
  throw Failure(Failure::kFailed, concat("No filter named ", repr_of_text(name), "."));
}

}  // namespace edgelm::capi::chat
