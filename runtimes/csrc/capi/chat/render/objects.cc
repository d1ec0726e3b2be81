// What templates get besides data: macros, loops and functions.
#include <chrono>
#include <ctime>

#include "capi/chat/render/interpreter.h"
#include "capi/chat/values/text.h"
#include "capi/common/unicode.h"

namespace edgelm::capi::chat {

bool Macro::attribute(const std::string& name, Value& value) {
  if (name == "name") {
    value = node.kind == Kind::kMacro ? Value(node.name) : Value();
  } else if (name == "arguments") {
    Collector names;
    for (const auto& parameter : node.parameters) names.add(Value(parameter.second));
    value = make_tuple(std::move(names.values));
  } else if (name == "catch_kwargs") {
    value = node.takes_named;
  } else if (name == "catch_varargs") {
    value = node.takes_positional;
  } else if (name == "caller") {
    value = node.takes_caller;
  } else {
    return false;
  }
  return true;
}

std::string Macro::text() {
  return node.kind == Kind::kMacro ? concat("<Macro ", repr_of_text(node.name), ">") : std::string("<Macro anonymous>");
}

namespace {

// A method of an object that is no plain data, such as loop.cycle.
template <class Function>
struct BoundFunction : Other {
  BoundFunction(Value of, Function function) : self(std::move(of)), function(function) { hold(sizeof(BoundFunction)); }
  const char* type_name() const override { return "method"; }
  Value call(Arguments& arguments) override { return function(self, arguments); }
  const Value self;
  const Function function;
};

template <class Function>
Value bound(Other* self, Function function) {
  return Value(Type::kOther, new BoundFunction<Function>(Value(Type::kOther, self), function));
}

}  // namespace

Loop::Loop(Interpreter& interpreter, const Node& node, ScopePtr scope, const Value& iterable, Value iterator,
           std::int64_t depth)
    : interpreter(interpreter),
      node(node),
      scope(std::move(scope)),
      iterable(iterable),
      iterator(std::move(iterator)),
      depth(depth) {
  hold(sizeof(Loop));
}

bool Loop::peek() {
  if (!has_after) has_after = iterator.as<Iterator>()->next(after);
  return has_after;
}

bool Loop::next(Value& value) {
  if (has_after) {
    value = after;
    has_after = false;
  } else if (!iterator.as<Iterator>()->next(value)) {
    return false;
  }
  ++place;
  before = current;
  current = value;
  return true;
}

bool Loop::length(std::int64_t& length) {
  if (count < 0 && !has_length(iterable, count)) {
    const Value rest = make_list(list_of(iterator));
    iterator = iterator_of(rest);
    count = static_cast<std::int64_t>(rest.items().size()) + place + 1 + has_after;
  }
  length = count;
  return true;
}

bool Loop::truth() {
  std::int64_t size = 0;
  length(size);
  return size != 0;
}

std::string Loop::text() {
  std::int64_t size = 0;
  length(size);
  return concat("<LoopContext ", place + 1, "/", size, ">");
}

Value Loop::call(Arguments& arguments) {
  const Parameters given("loop", arguments, {"iterable"}, 1);
  if (!node.flag) {
    raise_error("TypeError", "The loop must have the 'recursive' marker to be called recursively.");
  }
  return Value(interpreter.recurse(node, scope, given[0], depth + 1));
}

bool Loop::attribute(const std::string& name, Value& value) {
  std::int64_t size = 0;
  if (name == "index" || name == "index0") {
    value = Value(place + (name == "index"));
  } else if (name == "first") {
    value = place == 0;
  } else if (name == "last") {
    value = !peek();
  } else if (name == "length" || name == "revindex" || name == "revindex0") {
    length(size);
    value = Value(name == "length" ? size : size - place - (name == "revindex0"));
  } else if (name == "depth" || name == "depth0") {
    value = Value(depth + (name == "depth"));
  } else if (name == "previtem") {
    value = place == 0 ? make_undefined("there is no previous item") : before;
  } else if (name == "nextitem") {
    value = peek() ? after : make_undefined("there is no next item");
  } else if (name == "cycle") {
    value = bound(this, [](const Value& self, Arguments& given) {
      if (!given.named.empty()) raise_error("TypeError", "cycle() got an unexpected keyword argument");
      if (given.positional.empty()) raise_error("TypeError", "no items for cycling given");
      return given.positional[static_cast<std::size_t>(self.as<Loop>()->place) % given.positional.size()];
    });
  } else if (name == "changed") {
    value = bound(this, [](const Value& self, Arguments& given) {
      Loop& loop = *self.as<Loop>();
      if (!given.named.empty()) raise_error("TypeError", "changed() got an unexpected keyword argument");
      const Value now = make_tuple(given.positional);
      if (loop.has_changed && equal(loop.changed, now)) return Value(false);
      if (!loop.has_changed) loop.interpreter.keep(self);
      loop.changed = now;
      loop.has_changed = true;
      return Value(true);
    });
  } else {
    return false;
  }
  return true;
}

namespace {

struct Cycler : Other {
  explicit Cycler(std::vector<Value> values) : items(make_tuple(std::move(values))) { hold(sizeof(Cycler)); }
  const char* type_name() const override { return "Cycler"; }
  bool callable() const override { return false; }
  const Value& current() const { return items.items()[place]; }
  bool attribute(const std::string& name, Value& value) override {
    if (name == "current") {
      value = current();
    } else if (name == "items") {
      value = items;
    } else if (name == "pos") {
      value = Value(static_cast<std::int64_t>(place));
    } else if (name == "next" || name == "reset") {
      value = name == "next" ? bound(this, next_item) : bound(this, reset);
    } else {
      return false;
    }
    return true;
  }
  static Value next_item(const Value& self, Arguments& given) {
    Parameters("next", given, {}, 0);
    Cycler& cycler = *self.as<Cycler>();
    Value result = cycler.current();
    cycler.place = (cycler.place + 1) % cycler.items.items().size();
    return result;
  }
  static Value reset(const Value& self, Arguments& given) {
    Parameters("reset", given, {}, 0);
    self.as<Cycler>()->place = 0;
    return {};
  }
  const Value items;
  std::size_t place = 0;
};

struct Joiner : Other {
  explicit Joiner(Value separator) : separator(std::move(separator)) { hold(sizeof(Joiner)); }
  const char* type_name() const override { return "Joiner"; }
  Value call(Arguments& given) override {
    Parameters("joiner", given, {}, 0);
    Value result = used ? separator : Value("");
    used = true;
    return result;
  }
  bool attribute(const std::string& name, Value& value) override {
    if (name != "sep" && name != "used") return false;
    value = name == "sep" ? separator : Value(used);
    return true;
  }
  const Value separator;
  bool used = false;
};

// A function, by the pointer to what it does.
struct Function : Other {
  using Body = Value (*)(Interpreter&, Arguments&);
  Function(Interpreter& interpreter, Body body, bool is_dict)
      : interpreter(interpreter), body(body), is_dict(is_dict) {}
  const char* type_name() const override { return is_dict ? "Dict" : "function"; }
  Value call(Arguments& arguments) override { return body(interpreter, arguments); }
  bool attribute(const std::string& name, Value& value) override {
    if (!is_dict || name != "fromkeys") return false;
    value = bound(this, [](const Value&, Arguments& given) {
      const Parameters arguments("fromkeys", given, {"iterable", "value"}, 1, false);
      Value result = make_dict();
      Cursor cursor(arguments[0]);
      for (Value key; cursor.next(key);) result.as<Dict>()->set(key, arguments.value(1, Value()));
      return result;
    });
    return true;
  }
  Interpreter& interpreter;
  const Body body;
  const bool is_dict;
};

Value range(Interpreter&, Arguments& given) {
  if (!given.named.empty()) raise_error("TypeError", "safe_range() got an unexpected keyword argument");
  const std::vector<Value>& values = given.positional;
  if (values.empty() || values.size() > 3) {
    raise_error("TypeError", "range expected 1 to 3 arguments, got ", values.size());
  }
  for (const Value& value : values) integer_of(value);
  const std::int64_t start = values.size() > 1 ? values[0].integer() : 0;
  const std::int64_t stop = values[values.size() > 1].integer();
  const std::int64_t step = values.size() > 2 ? values[2].integer() : 1;
  if (step == 0) raise_error("ValueError", "range() arg 3 must not be zero");
  Value result(Type::kRange, new Range(start, stop, step));
  if (result.as<Range>()->size() > Limits::kRange) {
    raise_error("OverflowError", "Range too big. The sandbox blocks ranges larger than MAX_RANGE (", Limits::kRange,
                ").");
  }
  return result;
}

Value make_namespace(Interpreter& interpreter, Arguments& given) {
  auto* space = new Namespace;
  Value result(Type::kNamespace, space);
  space->hold(sizeof(Namespace));
  space->attributes = dict_of(given, "namespace");
  for (const auto& [name, value] : space->attributes.as<Dict>()->entries) {
    if (name.is_string() && !name.string().empty() && name.string()[0] == '_') {
      throw Failure(Failure::kForbidden, concat("a namespace cannot have the attribute ", shown(name)));
    }
  }
  interpreter.keep(result);
  return result;
}

Value raise_exception(Interpreter&, Arguments& given) {
  const Parameters arguments("raise_exception", given, {"message"}, 1);
  throw Failure(Failure::kRefused, text_of_value(arguments[0]));
}

Value strftime_now(Interpreter&, Arguments& given) {
  const Parameters arguments("strftime_now", given, {"format"}, 1);
  const std::string& format = arguments.string(0);
  if (format.find("%f") != std::string::npos || format.find('\0') != std::string::npos) {
    unsupported("%f in strftime_now");
  }
  const std::time_t now = std::chrono::system_clock::to_time_t(std::chrono::system_clock::now());
  std::tm local{};
#ifdef _WIN32
  localtime_s(&local, &now);
#else
  localtime_r(&now, &local);
#endif
  if (format.size() > 1000) unsupported("strftime_now with more than 1000 characters");
  std::string text(format.size() * 64 + 256, '\0');
  text.resize(std::strftime(text.data(), text.size(), format.c_str(), &local));
  if (valid_utf8_prefix(text) != text.size()) unsupported("strftime_now with this locale");
  return text;
}

// `self`, which has the blocks of the template.
struct Self : Other {
  struct Block : Other {
    Block(Interpreter& interpreter, const Node& node) : interpreter(interpreter), node(node) {}
    const char* type_name() const override { return "BlockReference"; }
    Value call(Arguments& given) override {
      Parameters("block", given, {}, 0);
      return Value(interpreter.call_block(node));
    }
    Interpreter& interpreter;
    const Node& node;
  };
  explicit Self(Interpreter& interpreter) : interpreter(interpreter) {}
  const char* type_name() const override { return "TemplateReference"; }
  bool callable() const override { return false; }
  bool item(const std::string& name, Value& value) override {
    const Node* block = interpreter.block_named(name);
    if (block != nullptr) value = Value(Type::kOther, new Block(interpreter, *block));
    return block != nullptr;
  }
  Interpreter& interpreter;
};

}  // namespace

Value make_self(Interpreter& interpreter) { return Value(Type::kOther, new Self(interpreter)); }

Value global_named(Interpreter& interpreter, const std::string& name, bool& found) {
  static const std::pair<const char*, Function::Body> functions[] = {
      {"range", range},
      {"dict", [](Interpreter&, Arguments& given) { return dict_of(given, "dict"); }},
      {"namespace", make_namespace},
      {"cycler",
       [](Interpreter&, Arguments& given) {
         if (!given.named.empty()) raise_error("TypeError", "cycler() got an unexpected keyword argument");
         if (given.positional.empty()) raise_error("RuntimeError", "at least one item has to be provided");
         return Value(Type::kOther, new Cycler(given.positional));
       }},
      {"joiner",
       [](Interpreter&, Arguments& given) {
         const Parameters arguments("joiner", given, {"sep"}, 0);
         return Value(Type::kOther, new Joiner(arguments.value(0, Value(", "))));
       }},
      {"raise_exception", raise_exception},
      {"strftime_now", strftime_now},
  };
  for (const auto& [known, body] : functions) {
    if (name == known) {
      found = true;
      return Value(Type::kOther, new Function(interpreter, body, name == "dict"));
    }
  }
  return {};
}

}  // namespace edgelm::capi::chat
