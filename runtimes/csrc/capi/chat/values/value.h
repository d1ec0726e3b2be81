// Values of templates, as Python has them. A value belongs to the rendering (and thread) that made it. Lists, tuples and
// dicts never change once a template can see them.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "capi/chat/values/limits.h"

namespace edgelm::capi::chat {

enum class Type : std::uint8_t {
  kNone,
  kBool,
  kInt,
  kFloat,
  // The others refer to an object.
  kString,
  kList,
  kTuple,
  kDict,
  kRange,
  kView,      // dict.keys(), dict.values() and dict.items()
  kIterator,  // a generator
  kUndefined,
  kNamespace,
  kOther,  // macros, functions, loops and so on
};

// What values refer to. Objects are counted against the limits of the rendering.
struct Object {
  Object() = default;
  virtual ~Object() { limits().release(held); }
  Object(const Object&) = delete;
  Object& operator=(const Object&) = delete;

  void hold(std::size_t bytes) {
    limits().hold(bytes);
    held += bytes;
  }
  std::size_t held = 0;
  std::uint32_t references = 0;
  std::uint32_t nesting = 0;  // levels of objects below this one
  Object* next_buried = nullptr;
};

// One reference less. Without any an object is deleted; those that only it referred to follow one after another, so that
// long chains need no deep stack.
void drop(Object* object);

class Value {
 public:
  Value() : type_(Type::kNone) { integer_ = 0; }
  Value(bool value) : type_(Type::kBool) { integer_ = value; }
  Value(std::int64_t value) : type_(Type::kInt) { integer_ = value; }
  Value(int value) : Value(std::int64_t(value)) {}
  Value(double value) : type_(Type::kFloat) { real_ = value; }
  Value(Type type, Object* object) : type_(type) {
    object_ = object;
    ++object->references;
  }
  Value(std::string text);
  Value(std::string_view text) : Value(std::string(text)) {}
  Value(const char* text) : Value(std::string(text)) {}
  Value(const Value& other) : type_(other.type_) {
    integer_ = other.integer_;
    if (other.is_object()) ++object_->references;
  }
  Value(Value&& other) noexcept : type_(other.type_) {
    integer_ = other.integer_;
    other.type_ = Type::kNone;
  }
  Value& operator=(Value other) noexcept {
    std::swap(type_, other.type_);
    std::swap(integer_, other.integer_);
    return *this;
  }
  ~Value() {
    if (is_object()) drop(object_);
  }

  Type type() const { return type_; }
  bool is(Type type) const { return type_ == type; }
  bool is_object() const { return type_ >= Type::kString; }
  bool is_string() const { return is(Type::kString); }
  bool is_undefined() const { return is(Type::kUndefined); }
  // Whether Python's int: bool is one.
  bool is_integral() const { return is(Type::kInt) || is(Type::kBool); }
  bool is_number() const { return is_integral() || is(Type::kFloat); }
  bool is_sequence() const { return is(Type::kList) || is(Type::kTuple); }

  bool boolean() const { return integer_ != 0; }
  std::int64_t integer() const { return integer_; }
  double real() const { return is(Type::kFloat) ? real_ : static_cast<double>(integer_); }
  const std::string& string() const;
  const std::vector<Value>& items() const;
  Object* object() const { return object_; }
  template <class Kind>
  Kind* as() const {
    return static_cast<Kind*>(object_);
  }
  // The object, if it is of this class; otherwise null.
  template <class Kind>
  Kind* maybe() const {
    return is(Type::kOther) ? dynamic_cast<Kind*>(object_) : nullptr;
  }

 private:
  Type type_;
  union {
    std::int64_t integer_;
    double real_;
    Object* object_;
  };
};

struct Text : Object {
  explicit Text(std::string value, bool markup = false);
  const std::string bytes;
  const bool markup;  // made by the filters escape and safe
  // Characters; counted when first asked for.
  std::size_t length() const;
  bool ascii() const { return length() == bytes.size(); }

 private:
  mutable std::size_t length_ = SIZE_MAX;
};

// A list or a tuple.
struct Items : Object {
  explicit Items(std::vector<Value> values, bool group = false);
  const std::vector<Value> values;
  const bool group;  // a tuple of the filter groupby, with names
};

struct Dict : Object {
  const Value* find(const Value& key) const;  // throws if the key cannot be hashed
  const Value* named(std::string_view key) const;
  void set(const Value& key, Value value);  // only while the dict is made
  void clear();
  std::vector<std::pair<Value, Value>> entries;

 private:
  std::ptrdiff_t place(const Value& key, std::size_t hash) const;
  std::unordered_multimap<std::size_t, std::size_t> index_;  // used from a few entries on
};

struct Range : Object {
  Range(std::int64_t start, std::int64_t stop, std::int64_t step) : start(start), stop(stop), step(step) {}
  std::int64_t size() const;
  Value at(std::int64_t place) const { return Value(start + place * step); }
  const std::int64_t start, stop, step;
};

struct View : Object {
  enum Kind { kKeys, kValues, kItems };
  View(Kind kind, Value dict);
  Value at(std::size_t place) const;
  std::size_t size() const { return dict.as<Dict>()->entries.size(); }
  const Kind kind;
  const Value dict;
};

// A generator: gives each item once.
struct Iterator : Object {
  virtual bool next(Value& value) = 0;
  // The depth of chains of iterators is limited, since each calls the one before it.
  void above(const Value& value);
};

struct Undefined : Object {
  Undefined(std::string message, bool unsafe) : message(std::move(message)), unsafe(unsafe) {}
  [[noreturn]] void fail() const;
  const std::string message;
  const bool unsafe;
};

struct Namespace : Object {
  Value attributes;  // a dict
};

// Other values, which can be called or have attributes.
struct Arguments;
struct Other : Object {
  virtual const char* type_name() const = 0;
  virtual bool callable() const { return true; }
  virtual Value call(Arguments&) { raise_error("TypeError", "'", type_name(), "' object is not callable"); }
  // Sets `found` where there is such an attribute.
  virtual bool attribute(const std::string&, Value&) { return false; }
  // value["name"], where that is no attribute.
  virtual bool item(const std::string&, Value&) { return false; }
  virtual bool truth() { return true; }
  virtual bool length(std::int64_t&) { return false; }
  // Its text, where that is not an address.
  virtual std::string text() { unsupported("the text of a ", type_name()); }
};

Value make_string(std::string text, bool markup = false);
Value make_list(std::vector<Value> values);
Value make_tuple(std::vector<Value> values);
Value make_undefined(std::string message, bool unsafe = false);
Value make_dict();

// Collects items of unknown number within the limits.
class Collector {
 public:
  Collector() = default;
  ~Collector() { limits().release(held_); }
  Collector(const Collector&) = delete;
  Collector& operator=(const Collector&) = delete;
  void add(Value value) {
    limits().step();
    limits().hold(sizeof(Value));
    held_ += sizeof(Value);
    values.push_back(std::move(value));
  }
  std::vector<Value> values;

 private:
  std::size_t held_ = 0;
};

// Builds a text within the limits.
class Writer {
 public:
  Writer() = default;
  ~Writer() { limits().release(held_); }
  Writer(const Writer&) = delete;
  Writer& operator=(const Writer&) = delete;
  Writer& add(std::string_view part) {
    limits().copy(part.size());
    if (text.size() + part.size() > held_) grow(part.size());
    text.append(part);
    return *this;
  }
  void repeat(std::string_view part, std::size_t count);
  std::string text;

 private:
  void grow(std::size_t more);
  std::size_t held_ = 0;
};

}  // namespace edgelm::capi::chat
