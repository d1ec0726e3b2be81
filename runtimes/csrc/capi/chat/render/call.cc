#include "capi/chat/render/call.h"

#include "capi/chat/values/text.h"

namespace edgelm::capi::chat {

Parameters::Parameters(const char* function, const Arguments& given, std::initializer_list<const char*> names,
                       std::size_t required, bool by_name)
    : function_(function), values_(names.size(), nullptr) {
  if (given.positional.size() > names.size()) {
    raise_error("TypeError", function, "() takes at most ", names.size(), " arguments (", given.positional.size(),
                " given)");
  }
  for (std::size_t i = 0; i < given.positional.size(); ++i) values_[i] = &given.positional[i];
  for (const auto& [name, value] : given.named) {
    std::size_t place = 0;
    while (place < names.size() && (!by_name || name != names.begin()[place])) ++place;
    if (place == names.size()) {
      raise_error("TypeError", function, "() got an unexpected keyword argument '", name, "'");
    }
    if (values_[place] != nullptr) {
      raise_error("TypeError", function, "() got multiple values for argument '", name, "'");
    }
    values_[place] = &value;
  }
  for (std::size_t i = 0; i < required; ++i) {
    if (values_[i] == nullptr) {
      raise_error("TypeError", function, "() missing required argument '", names.begin()[i], "'");
    }
  }
}

std::int64_t Parameters::integer(std::size_t place, std::int64_t otherwise) const {
  if (!has(place)) return otherwise;
  const Value& value = *values_[place];
  if (value.is_undefined()) value.as<Undefined>()->fail();
  return integer_of(value);
}

bool Parameters::truth(std::size_t place, bool otherwise) const {
  return has(place) ? chat::truth(*values_[place]) : otherwise;
}

const std::string& Parameters::string(std::size_t place) const {
  const Value& value = *values_[place];
  if (!value.is_string()) {
    raise_error("TypeError", function_, "() argument must be str, not ", type_name(value));
  }
  return value.string();
}

Value call(const Value& function, Arguments& arguments) {
  limits().step();
  if (function.is_undefined()) function.as<Undefined>()->fail();
  if (!function.is(Type::kOther)) raise_error("TypeError", "'", type_name(function), "' object is not callable");
  return function.as<Other>()->call(arguments);
}

namespace {

// What has a method and its object.
struct BoundMethod : Other {
  BoundMethod(Value of, Method method) : self(std::move(of)), method(method) {
    if (self.is_object()) nesting = self.object()->nesting + 1;
    hold(sizeof(BoundMethod));
  }
  const char* type_name() const override { return "builtin_function_or_method"; }
  Value call(Arguments& arguments) override { return method(self, arguments); }
  const Value self;
  const Method method;
};

template <class Names>
bool among(const Names& names, const std::string& name) {
  for (const char* one : names) {
    if (name == one) return true;
  }
  return false;
}

// Attributes that Python's values have and templates may use, but that are not here.
bool is_left_out(const Value& value, const std::string& name) {
  static const char* const strings[] = {"casefold", "encode",    "isidentifier", "isnumeric",
                                        "istitle",  "maketrans", "translate",    "swapcase"};
  static const char* const numbers[] = {"as_integer_ratio", "bit_count", "bit_length", "conjugate", "denominator",
                                        "from_bytes",       "fromhex",   "hex",        "imag",      "is_integer",
                                        "numerator",        "real",      "to_bytes"};
  static const char* const iterators[] = {"close", "send", "throw", "gi_running", "gi_yieldfrom"};
  switch (value.type()) {
    case Type::kString: return among(strings, name);
    case Type::kInt:
    case Type::kBool:
    case Type::kFloat: return among(numbers, name);
    case Type::kIterator: return among(iterators, name);
    case Type::kView: return name == "isdisjoint" || name == "mapping";
    case Type::kDict: return name == "fromkeys";
    default: return false;
  }
}

// Attributes that change a value, and those that all objects of Python have.
bool is_unsafe(const Value& value, const std::string& name) {
  static const char* const lists[] = {"append", "clear", "extend", "insert", "pop", "remove", "reverse", "sort"};
  static const char* const dicts[] = {"clear", "pop", "popitem", "setdefault", "update"};
  static const char* const objects[] = {
      "__class__",   "__delattr__", "__dir__",           "__doc__",         "__eq__",
      "__format__",  "__ge__",      "__getattribute__",  "__getstate__",    "__gt__",
      "__hash__",    "__init__",    "__init_subclass__", "__le__",          "__lt__",
      "__ne__",      "__new__",     "__reduce__",        "__reduce_ex__",   "__repr__",
      "__setattr__", "__sizeof__",  "__str__",           "__subclasshook__"};
  if (value.is(Type::kNamespace)) return name == "__class__";
  if (value.is(Type::kList) && among(lists, name)) return true;
  if (value.is(Type::kDict) && among(dicts, name)) return true;
  return among(objects, name);
}

std::string object_name(const Value& value) {
  return value.is(Type::kNone) ? "None" : concat(type_name(value), " object");
}

Value unsafe_attribute(const Value& value, const std::string& name) {
  return make_undefined(
      concat("access to attribute ", repr_of_text(name), " of '", type_name(value), "' object is unsafe."), true);
}

}  // namespace

Found find_attribute(const Value& value, const std::string& name, Value& attribute) {
  if (value.is_undefined()) value.as<Undefined>()->fail();
  if (value.is(Type::kNamespace)) {
    const Value* found = value.as<Namespace>()->attributes.as<Dict>()->named(name);
    if (found != nullptr) {
      attribute = *found;
      return Found::kYes;
    }
    return is_unsafe(value, name) ? Found::kUnsafe : Found::kMissing;
  }
  if (value.is(Type::kOther) && value.as<Other>()->attribute(name, attribute)) return Found::kYes;
  if (is_unsafe(value, name)) return Found::kUnsafe;
  if (is_left_out(value, name)) unsupported(name, " of a ", type_name(value));
  if (value.is(Type::kRange) && (name == "start" || name == "stop" || name == "step")) {
    const Range& range = *value.as<Range>();
    attribute = Value(name == "start" ? range.start : name == "stop" ? range.stop : range.step);
    return Found::kYes;
  }
  if (value.is(Type::kTuple) && value.as<Items>()->group && (name == "grouper" || name == "list")) {
    attribute = value.items()[name == "list"];
    return Found::kYes;
  }
  const Method method = value.is_string() ? string_method(name) : container_method(value.type(), name);
  if (method == nullptr) return Found::kMissing;
  if (value.is_string() && value.as<Text>()->markup) {
    unsupported(name, " of a text that the filters escape or safe made");
  }
  attribute = Value(Type::kOther, new BoundMethod(value, method));
  return Found::kYes;
}

Value attribute_of(const Value& value, const std::string& name) {
  Value result;
  switch (find_attribute(value, name, result)) {
    case Found::kYes: return result;
    case Found::kUnsafe: return unsafe_attribute(value, name);
    default: break;
  }
  if (value.is(Type::kDict)) {
    const Value* found = value.as<Dict>()->named(name);
    if (found != nullptr) return *found;
  } else if (value.is(Type::kOther)) {
    if (value.as<Other>()->item(name, result)) return result;
  }
  return make_undefined(concat("'", object_name(value), "' has no attribute ", repr_of_text(name)));
}

Value item_of(const Value& value, const Value& index) {
  Value result;
  if (item_at(value, index, result)) return result;
  if (!index.is_string()) {
    return make_undefined(concat(object_name(value), " has no element ", shown(index)));
  }
  const std::string& name = index.string();
  if (value.is(Type::kOther) && value.as<Other>()->item(name, result)) return result;
  switch (find_attribute(value, name, result)) {
    case Found::kYes: return result;
    case Found::kUnsafe: return unsafe_attribute(value, name);
    default: return make_undefined(concat("'", object_name(value), "' has no attribute ", shown(index)));
  }
}

Value dict_of(const Arguments& arguments, const char* function) {
  Value result = make_dict();
  Dict& dict = *result.as<Dict>();
  if (arguments.positional.size() > 1) {
    raise_error("TypeError", function, " expected at most 1 argument, got ", arguments.positional.size());
  }
  if (!arguments.positional.empty()) {
    const Value& of = arguments.positional[0];
    if (of.is(Type::kDict)) {
      for (const auto& [key, value] : of.as<Dict>()->entries) dict.set(key, value);
    } else {
      Cursor cursor(of);
      for (Value pair; cursor.next(pair);) {
        if (!is_iterable(pair)) {
          raise_error("TypeError", "cannot convert dictionary update sequence element to a sequence");
        }
        const std::vector<Value> parts = list_of(pair);
        if (parts.size() != 2) {
          raise_error("ValueError", "dictionary update sequence element has length ", parts.size(), "; 2 is required");
        }
        dict.set(parts[0], parts[1]);
      }
    }
  }
  for (const auto& [name, value] : arguments.named) dict.set(Value(name), value);
  return result;
}

}  // namespace edgelm::capi::chat
