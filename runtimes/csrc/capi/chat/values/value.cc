#include "capi/chat/values/value.h"

#include <algorithm>

#include "capi/chat/values/operations.h"
#include "capi/chat/values/text.h"

namespace edgelm::capi::chat {

namespace {

thread_local Limits* current = nullptr;
constexpr std::size_t kIndexed = 8;  // entries from which on a dict has an index

std::uint32_t above(const std::vector<Value>& values) {
  std::uint32_t nesting = 0;
  for (const Value& value : values) {
    if (value.is_object()) nesting = std::max(nesting, value.object()->nesting + 1);
  }
  return nesting;
}

void check_nesting(std::uint32_t nesting) {
  if (nesting > Limits::kNesting) throw Failure(Failure::kLimit, "values nested too deeply");
}

}  // namespace

std::string joined(std::initializer_list<Part> parts) {
  std::string text;
  for (const Part& part : parts) text += part.is_number ? std::to_string(part.number) : std::string(part.text);
  return text;
}

void throw_error(const char* type, std::initializer_list<Part> parts) {
  throw Failure(Failure::kFailed, std::string(type) + ": " + joined(parts));
}

void throw_unsupported(std::initializer_list<Part> parts) { throw Failure(Failure::kUnsupported, joined(parts)); }

void Limits::throw_steps() { throw Failure(Failure::kLimit, "more steps than it may take"); }
void Limits::throw_memory() { throw Failure(Failure::kLimit, "more memory than it may have"); }

Limits& limits() { return *current; }
LimitsScope::LimitsScope(Limits& limits) : before_(current) { current = &limits; }
LimitsScope::~LimitsScope() { current = before_; }

void drop(Object* object) {
  if (--object->references > 0) return;
  Limits& owner = limits();
  object->next_buried = owner.buried;
  owner.buried = object;
  if (owner.burying) return;
  owner.burying = true;
  while (owner.buried != nullptr) {
    Object* const last = owner.buried;
    owner.buried = last->next_buried;
    delete last;
  }
  owner.burying = false;
}

Value::Value(std::string text) : Value(Type::kString, new Text(std::move(text))) {}

const std::string& Value::string() const { return as<Text>()->bytes; }
const std::vector<Value>& Value::items() const { return as<Items>()->values; }

Text::Text(std::string value, bool markup) : bytes(std::move(value)), markup(markup) {
  hold(sizeof(Text) + bytes.capacity());
}

std::size_t Text::length() const {
  if (length_ == SIZE_MAX) length_ = count_characters(bytes);
  return length_;
}

Items::Items(std::vector<Value> given, bool group) : values(std::move(given)), group(group) {
  nesting = above(values);
  check_nesting(nesting);
  hold(sizeof(Items) + values.capacity() * sizeof(Value));
}

View::View(Kind kind, Value of) : kind(kind), dict(std::move(of)) {
  hold(sizeof(View));
  nesting = dict.object()->nesting + 1;
  check_nesting(nesting);
}

Value View::at(std::size_t place) const {
  const auto& [key, value] = dict.as<Dict>()->entries[place];
  return kind == kKeys ? key : kind == kValues ? value : make_tuple({key, value});
}

std::int64_t Range::size() const {
  // As unsigned numbers, so that no difference overflows.
  const auto low = static_cast<std::uint64_t>(step > 0 ? start : stop);
  const auto high = static_cast<std::uint64_t>(step > 0 ? stop : start);
  if (step > 0 ? start >= stop : start <= stop) return 0;
  const std::uint64_t pace = step > 0 ? static_cast<std::uint64_t>(step) : 0 - static_cast<std::uint64_t>(step);
  const std::uint64_t count = (high - low - 1) / pace + 1;
  return static_cast<std::int64_t>(std::min<std::uint64_t>(count, INT64_MAX));
}

void Iterator::above(const Value& value) {
  if (value.is_object()) nesting = std::max(nesting, value.object()->nesting + 1);
  check_nesting(nesting);
}

void Undefined::fail() const { throw Failure(unsafe ? Failure::kForbidden : Failure::kFailed, message); }

std::ptrdiff_t Dict::place(const Value& key, std::size_t hash) const {
  if (entries.size() < kIndexed) {
    for (std::size_t i = 0; i < entries.size(); ++i) {
      if (equal(entries[i].first, key)) return static_cast<std::ptrdiff_t>(i);
    }
    return -1;
  }
  const auto [first, last] = index_.equal_range(hash);
  for (auto it = first; it != last; ++it) {
    if (equal(entries[it->second].first, key)) return static_cast<std::ptrdiff_t>(it->second);
  }
  return -1;
}

const Value* Dict::find(const Value& key) const {
  const std::ptrdiff_t found = place(key, hash_of(key));
  return found < 0 ? nullptr : &entries[static_cast<std::size_t>(found)].second;
}

const Value* Dict::named(std::string_view key) const {
  if (entries.size() >= kIndexed) return find(Value(key));
  for (const auto& [name, value] : entries) {
    limits().step();
    if (name.is_string() && name.string() == key) return &value;
  }
  return nullptr;
}

void Dict::set(const Value& key, Value value) {
  const std::size_t hash = hash_of(key);
  const std::ptrdiff_t found = place(key, hash);
  for (const Value* part : {&key, &std::as_const(value)}) {
    if (part->is_object()) nesting = std::max(nesting, part->object()->nesting + 1);
  }
  check_nesting(nesting);
  if (found >= 0) {
    entries[static_cast<std::size_t>(found)].second = std::move(value);
    return;
  }
  hold(entries.size() < kIndexed ? 64 : 128);
  entries.emplace_back(key, std::move(value));
  if (entries.size() == kIndexed) {
    for (std::size_t i = 0; i < entries.size(); ++i) index_.emplace(hash_of(entries[i].first), i);
  } else if (entries.size() > kIndexed) {
    index_.emplace(hash, entries.size() - 1);
  }
}

void Dict::clear() {
  entries.clear();
  index_.clear();
}

Value make_string(std::string text, bool markup) { return Value(Type::kString, new Text(std::move(text), markup)); }
Value make_list(std::vector<Value> values) { return Value(Type::kList, new Items(std::move(values))); }
Value make_tuple(std::vector<Value> values) { return Value(Type::kTuple, new Items(std::move(values))); }

Value make_undefined(std::string message, bool unsafe) {
  return Value(Type::kUndefined, new Undefined(std::move(message), unsafe));
}

Value make_dict() {
  Dict* dict = new Dict;
  const Value value(Type::kDict, dict);
  dict->hold(sizeof(Dict));
  return value;
}

void Writer::grow(std::size_t more) {
  const std::size_t wanted = std::max(text.size() + more, std::max<std::size_t>(2 * held_, 64));
  const std::size_t needed = text.size() + more;
  // The old and the new text are alive while it grows.
  limits().check(needed);
  limits().hold(wanted > 4096 ? needed - held_ : wanted - held_);
  held_ = wanted > 4096 ? needed : wanted;
}

void Writer::repeat(std::string_view part, std::size_t count) {
  if (part.empty()) return;
  if (count > Limits::kMemory / part.size()) limits().check(SIZE_MAX);
  limits().check(part.size() * count);
  for (; count > 0; --count) add(part);
}

}  // namespace edgelm::capi::chat
