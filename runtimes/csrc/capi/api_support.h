// What the C functions share: exceptions become errors, structs of other versions are read, memory is malloc's.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <new>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "capi/common/error.h"
#include "capi/edgelm.h"
#include "capi/generation/model.h"

struct edgelm_error {
  edgelm_code code;
  std::string message;
};

struct edgelm_model {
  // Calls hold the model while they run: edgelm_close in a callback then frees it when the last has returned.
  std::shared_ptr<edgelm::capi::Model> model;
  std::vector<std::int32_t> eos_ids;
};

struct edgelm_generation { edgelm::capi::Generation result; };

struct edgelm_detokenizer {
  std::shared_ptr<const edgelm::capi::Tokenizer> tokenizer;
  edgelm::capi::Detokenizer stream;
  std::string text;  // what the last call returned
};

namespace edgelm::capi {

// An error that edgelm_error_free frees. Never throws: without memory it is a constant one.
edgelm_error* new_error(edgelm_code code, const char* message) noexcept;

// Run `body`; return what it throws as an error, nullptr without one.
template <class Body>
edgelm_error* guarded(Body&& body) noexcept {
  try {
    body();
    return nullptr;
  } catch (const Error& error) {
    return new_error(error.code, error.what());
  } catch (const std::bad_alloc&) {
    return new_error(EDGELM_RUNTIME, "out of memory");
  } catch (const std::exception& error) {
    return new_error(EDGELM_INTERNAL, error.what());
  } catch (...) {
    return new_error(EDGELM_INTERNAL, "an exception of an unknown type");
  }
}

template <class Pointer>
void require_given(Pointer pointer, const char* name) {
  if (pointer == nullptr) fail(EDGELM_INVALID_ARGUMENT, name, " is NULL");
}

inline std::shared_ptr<Model> held(const edgelm_model* model) {
  require_given(model, "model");
  return model->model;
}

// A string of the caller's; `data` may be NULL if it is empty.
inline std::string_view text_at(const char* data, std::size_t size, const char* name) {
  if (size == 0) return {};
  require_given(data, name);
  if (size > PTRDIFF_MAX) fail(EDGELM_INVALID_ARGUMENT, name, " has ", size, " bytes: its size cannot be right");
  return {data, size};
}

// Token ids of the caller's.
inline std::vector<std::int32_t> ids_at(const std::int32_t* ids, std::size_t count) {
  if (count == 0) return {};
  require_given(ids, "ids");
  if (count > INT32_MAX) fail(EDGELM_INVALID_ARGUMENT, "count is ", count, ": that cannot be the number of ids");
  return std::vector<std::int32_t>(ids, ids + count);
}

// An integer option that is 0 for its default.
inline std::int64_t count_of(std::int64_t value, const char* name) {
  if (value < 0) fail(EDGELM_INVALID_ARGUMENT, name, " is ", value, ": give 1 or more, or 0 for the default");
  return value;
}

inline std::string or_empty(const char* text) { return text == nullptr ? std::string() : std::string(text); }

// Memory that edgelm_free frees.
inline void* allocated(std::size_t size) {
  void* memory = std::malloc(size == 0 ? 1 : size);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

inline void return_text(const std::string& from, char** text, std::size_t* size) {
  auto* copy = static_cast<char*>(allocated(from.size() + 1));
  std::memcpy(copy, from.c_str(), from.size() + 1);
  *text = copy;
  *size = from.size();
}

constexpr std::size_t kMostStruct = 4096;

// The size that the caller gave a struct in its first member, checked.
template <class Struct>
std::size_t struct_size(const Struct* given, const char* type) {
  std::size_t size = 0;
  std::memcpy(&size, given, sizeof size);
  if (size < sizeof(std::size_t) + sizeof(void*) || size > kMostStruct || size % alignof(Struct) != 0)
    fail(EDGELM_INVALID_ARGUMENT, type, ": its size is ", size, ": set it with EDGELM_INIT(", type, ")");
  return size;
}

// Options of a caller that was compiled with this header, an older or a newer one. NULL: the defaults.
template <class Struct>
Struct options_at(const Struct* given, const char* type) {
  Struct options = EDGELM_INIT(Struct);
  if (given == nullptr) return options;
  const std::size_t size = struct_size(given, type);
  const auto* bytes = reinterpret_cast<const unsigned char*>(given);
  for (std::size_t i = sizeof(Struct); i < size; ++i)
    if (bytes[i] != 0)
      fail(EDGELM_INVALID_ARGUMENT, type, " sets an option that EdgeLM ", edgelm_version(),
           " does not have: ship the library of the header that the app was compiled with");
  std::memcpy(&options, given, std::min(size, sizeof(Struct)));
  options.size = sizeof(Struct);
  return options;
}

// Fill in a struct of such a caller, whose size stays.
template <class Struct>
void fill_in(Struct* out, const char* type, Struct value) {
  require_given(out, type);
  value.size = struct_size(out, type);
  std::memcpy(out, &value, std::min(value.size, sizeof(Struct)));
  auto* bytes = reinterpret_cast<unsigned char*>(out);
  if (value.size > sizeof(Struct)) std::memset(bytes + sizeof(Struct), 0, value.size - sizeof(Struct));
}

}  // namespace edgelm::capi
