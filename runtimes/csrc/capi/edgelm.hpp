// EdgeLM for C++17: edgelm.h with objects that free themselves, exceptions and std types. Header only, so an app needs
// no C++ ABI of the library.
//
//   edgelm::Model model("bundle");
//   edgelm::GenerateOptions options;
//   options.max_tokens = 64;
//   options.on_text = [](std::string_view text) { return bool(std::cout << text << std::flush); };
//   model.generate("Once upon a time", options);
//
// Threads are as in edgelm.h. Every function throws edgelm::Error. Views of text are valid as long as what they are of.
#ifndef EDGELM_HPP_
#define EDGELM_HPP_

#include <cstdint>
#include <exception>
#include <functional>
#include <initializer_list>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "edgelm.h"

namespace edgelm {

// What a function of edgelm.h returned: its code, and its message in what().
class Error : public std::runtime_error {
 public:
  Error(edgelm_code code, const char* message) : std::runtime_error(message), code_(code) {}
  edgelm_code code() const noexcept { return code_; }

 private:
  edgelm_code code_;
};

namespace detail {

inline void check(edgelm_error* error) {
  if (error == nullptr) return;
  const std::unique_ptr<edgelm_error, void (*)(edgelm_error*)> owner(error, &edgelm_error_free);
  throw Error(edgelm_error_code(error), edgelm_error_message(error));
}

inline const char* or_null(const std::string& text) { return text.empty() ? nullptr : text.c_str(); }

// Text that the library allocated.
inline std::string taken(char* text, std::size_t size) {
  const std::unique_ptr<char, void (*)(void*)> owner(text, &edgelm_free);
  return std::string(text, size);
}

inline void append_json(std::string& json, std::string_view text) {
  static constexpr char kDigits[] = "0123456789abcdef";
  json += '"';
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      json += '\\';
      json += c;
    } else if (static_cast<unsigned char>(c) < 0x20) {
      json += "\\u00";
      json += kDigits[c >> 4];
      json += kDigits[c & 15];
    } else {
      json += c;
    }
  }
  json += '"';
}

}  // namespace detail

inline int abi_version() noexcept { return edgelm_abi_version(); }
inline std::string_view version() noexcept { return edgelm_version(); }

// Options of opening a bundle; empty or 0 is the default. See edgelm_open_options.
struct OpenOptions {
  std::string runtime, onnxruntime, kv;
  int threads = 0, context_length = 0, chunk = 0;
};

// A message of a conversation.
struct Message { std::string role, content; };

// The JSON that edgelm_chat and edgelm_render_chat take.
inline std::string to_json(const std::vector<Message>& messages) {
  std::string json = "[";
  for (const Message& message : messages) {
    json += json.size() > 1 ? ", {\"role\": " : "{\"role\": ";
    detail::append_json(json, message.role);
    json += ", \"content\": ";
    detail::append_json(json, message.content);
    json += '}';
  }
  return json + ']';
}

// Options of a generation; the members' values are the defaults. See edgelm_generate_options.
struct GenerateOptions {
  std::optional<int> max_tokens = 256;  // none: until the model ends the text or the context is full; 0: 256
  double temperature = 0;
  int top_k = 0;
  double top_p = 1, min_p = 0, repetition_penalty = 1;
  std::optional<std::uint64_t> seed;
  std::vector<std::string> stop;
  bool reuse = false;
  // Called with each part of the text; return true to go on. What it throws ends the generation, and is thrown there.
  std::function<bool(std::string_view text)> on_text;
};

// Seconds and tokens, as edgelm_timings.
struct Timings : edgelm_timings {
  double prefill_tokens_per_second() const {
    return prefill_seconds > 0 ? double(prompt_tokens - reused_tokens) / prefill_seconds : 0;
  }
  double decode_tokens_per_second() const { return decode_seconds > 0 ? double(decoded_tokens) / decode_seconds : 0; }
};

// A generated text.
class Generation {
 public:
  explicit Generation(edgelm_generation* generation) : generation_(generation, &edgelm_generation_free) {}

  std::string_view text() const& {
    std::size_t size = 0;
    const char* text = edgelm_generation_text(generation_.get(), &size);
    return {text, size};
  }
  std::string text() const&& { return std::string(static_cast<const Generation&>(*this).text()); }  // a copy
  std::vector<std::int32_t> tokens() const {
    std::size_t count = 0;
    const std::int32_t* tokens = edgelm_generation_tokens(generation_.get(), &count);
    return std::vector<std::int32_t>(tokens, tokens + count);
  }
  edgelm_stop_reason reason() const { return edgelm_generation_reason(generation_.get()); }
  Timings timings() const {
    Timings timings{};
    timings.size = sizeof(edgelm_timings);
    detail::check(edgelm_generation_timings(generation_.get(), &timings));
    return timings;
  }
  const edgelm_generation* get() const { return generation_.get(); }

 private:
  std::unique_ptr<edgelm_generation, void (*)(edgelm_generation*)> generation_;
};

// Text of token ids one by one; see edgelm_detokenizer_new.
class Detokenizer {
 public:
  explicit Detokenizer(edgelm_detokenizer* detokenizer) : detokenizer_(detokenizer, &edgelm_detokenizer_free) {}

  // Valid until the next call.
  std::string_view push(std::int32_t id) {
    const char* text = nullptr;
    std::size_t size = 0;
    detail::check(edgelm_detokenizer_push(detokenizer_.get(), id, &text, &size));
    return {text, size};
  }
  std::string_view flush() {
    const char* text = nullptr;
    std::size_t size = 0;
    detail::check(edgelm_detokenizer_flush(detokenizer_.get(), &text, &size));
    return {text, size};
  }

 private:
  std::unique_ptr<edgelm_detokenizer, void (*)(edgelm_detokenizer*)> detokenizer_;
};

// An opened bundle. Movable; the destructor closes it.
class Model {
 public:
  explicit Model(const std::string& path, const OpenOptions& options = {}) : model_(nullptr, &edgelm_close) {
    edgelm_open_options given = EDGELM_INIT(edgelm_open_options);
    given.runtime = detail::or_null(options.runtime);
    given.onnxruntime = detail::or_null(options.onnxruntime);
    given.kv = detail::or_null(options.kv);
    given.threads = options.threads;
    given.context_length = options.context_length;
    given.chunk = options.chunk;
    edgelm_model* model = nullptr;
    detail::check(edgelm_open(path.c_str(), &given, &model));
    model_.reset(model);
  }

  // Strings in it are valid as long as the model.
  edgelm_model_info info() const {
    edgelm_model_info info = EDGELM_INIT(edgelm_model_info);
    detail::check(edgelm_get_info(get(), &info));
    return info;
  }

  // `add_bos`: none for the tokenizer's default.
  std::vector<std::int32_t> tokenize(std::string_view text, std::optional<bool> add_bos = {}) const {
    std::int32_t* ids = nullptr;
    std::size_t count = 0;
    detail::check(edgelm_tokenize(get(), text.data(), text.size(), add_bos ? int(*add_bos) : -1, &ids, &count));
    const std::unique_ptr<std::int32_t, void (*)(void*)> owner(ids, &edgelm_free);
    return std::vector<std::int32_t>(ids, ids + count);
  }
  std::string detokenize(const std::vector<std::int32_t>& ids, bool skip_special = true) const {
    char* text = nullptr;
    std::size_t size = 0;
    detail::check(edgelm_detokenize(get(), ids.data(), ids.size(), skip_special, &text, &size));
    return detail::taken(text, size);
  }
  Detokenizer detokenizer(bool skip_special = true) const {
    edgelm_detokenizer* detokenizer = nullptr;
    detail::check(edgelm_detokenizer_new(get(), skip_special, &detokenizer));
    return Detokenizer(detokenizer);
  }

  // The prompt of a conversation; tokenise it with add_bos false. `variables`: a JSON object for the template, or empty.
  std::string render_chat(const std::vector<Message>& messages, std::string_view variables = {},
                          bool add_generation_prompt = true) const {
    return render_chat_json(to_json(messages), variables, add_generation_prompt);
  }
  std::string render_chat_json(std::string_view messages, std::string_view variables = {},
                               bool add_generation_prompt = true) const {
    char* text = nullptr;
    std::size_t size = 0;
    detail::check(edgelm_render_chat(get(), messages.data(), messages.size(),
                                     variables.empty() ? nullptr : variables.data(), variables.size(),
                                     add_generation_prompt, &text, &size));
    return detail::taken(text, size);
  }

  Generation generate(std::string_view prompt, const GenerateOptions& options = {}) {
    return run(options, [&](const edgelm_generate_options* given, edgelm_generation** generation) {
      return edgelm_generate_text(get(), prompt.data(), prompt.size(), given, generation);
    });
  }
  Generation generate(const std::vector<std::int32_t>& ids, const GenerateOptions& options = {}) {
    return run(options, [&](const edgelm_generate_options* given, edgelm_generation** generation) {
      return edgelm_generate(get(), ids.data(), ids.size(), given, generation);
    });
  }
  Generation chat(const std::vector<Message>& messages, const GenerateOptions& options = {}) {
    return chat_json(to_json(messages), options);
  }
  Generation chat_json(std::string_view messages, const GenerateOptions& options = {}) {
    return run(options, [&](const edgelm_generate_options* given, edgelm_generation** generation) {
      return edgelm_chat(get(), messages.data(), messages.size(), given, generation);
    });
  }
  // From any thread.
  void cancel() noexcept { edgelm_cancel(get()); }

  // Logits of the last `positions` ids, [positions, vocab_size].
  std::vector<float> logits(const std::vector<std::int32_t>& ids, std::size_t positions = 1) {
    std::vector<float> logits(positions * std::size_t(info().vocab_size));
    detail::check(edgelm_logits(get(), ids.data(), ids.size(), positions, logits.data(), logits.size()));
    return logits;
  }
  void save_session(const std::string& path) { detail::check(edgelm_save_session(get(), path.c_str())); }
  void load_session(const std::string& path) { detail::check(edgelm_load_session(get(), path.c_str())); }
  void reset() { detail::check(edgelm_reset(get())); }
  std::int64_t cached_tokens() {
    std::int64_t count = 0;
    detail::check(edgelm_cached_tokens(get(), &count));
    return count;
  }

  // For the functions of edgelm.h.
  edgelm_model* get() const { return model_.get(); }

 private:
  // What a callback needs: exceptions must not pass through C.
  struct Listener {
    const std::function<bool(std::string_view)>& on_text;
    std::exception_ptr thrown;
  };
  static int listen(void* user, const char* text, std::size_t size) noexcept {
    auto& listener = *static_cast<Listener*>(user);
    try {
      return listener.on_text({text, size}) ? 0 : 1;
    } catch (...) {
      listener.thrown = std::current_exception();
      return 1;
    }
  }

  template <class Call>
  static Generation run(const GenerateOptions& options, Call&& call) {
    std::vector<const char*> stop;
    for (const std::string& one : options.stop) stop.push_back(one.c_str());
    edgelm_generate_options given = EDGELM_INIT(edgelm_generate_options);
    given.max_tokens = options.max_tokens ? *options.max_tokens : -1;
    given.temperature = options.temperature;
    given.top_k = options.top_k;
    given.top_p = options.top_p;
    given.min_p = options.min_p;
    given.repetition_penalty = options.repetition_penalty;
    given.seed = options.seed ? &*options.seed : nullptr;
    given.stop = stop.data();
    given.stop_count = stop.size();
    given.reuse = options.reuse;
    Listener listener{options.on_text, nullptr};
    if (options.on_text) {
      given.on_text = &listen;
      given.user = &listener;
    }
    edgelm_generation* generation = nullptr;
    detail::check(call(&given, &generation));
    Generation result(generation);
    if (listener.thrown) std::rethrow_exception(listener.thrown);
    return result;
  }

  std::unique_ptr<edgelm_model, void (*)(edgelm_model*)> model_;
};

struct ParityOptions {
  std::string runtime, onnxruntime, kv;
  int threads = 0;
  bool skip_layers = false;
  // Return true to go on.
  std::function<bool(std::string_view what, std::int64_t done, std::int64_t total)> on_progress;
};

struct ParityResult {
  bool passed;
  std::string report;  // JSON
};

inline ParityResult parity(const std::string& path, const ParityOptions& options = {}) {
  struct Listener {
    const ParityOptions& options;
    std::exception_ptr thrown;
  } listener{options, nullptr};
  edgelm_parity_options given = EDGELM_INIT(edgelm_parity_options);
  given.runtime = detail::or_null(options.runtime);
  given.onnxruntime = detail::or_null(options.onnxruntime);
  given.kv = detail::or_null(options.kv);
  given.threads = options.threads;
  given.skip_layers = options.skip_layers;
  given.user = &listener;
  if (options.on_progress)
    given.on_progress = [](void* user, const char* what, std::int64_t done, std::int64_t total) -> int {
      auto& listening = *static_cast<Listener*>(user);
      try {
        return listening.options.on_progress(what, done, total) ? 0 : 1;
      } catch (...) {
        listening.thrown = std::current_exception();
        return 1;
      }
    };
  int passed = 0;
  char* report = nullptr;
  std::size_t size = 0;
  edgelm_error* error = edgelm_parity(path.c_str(), &given, &passed, &report, &size);
  if (listener.thrown) {
    edgelm_error_free(error);
    edgelm_free(report);
    std::rethrow_exception(listener.thrown);
  }
  detail::check(error);
  return {passed != 0, detail::taken(report, size)};
}

}  // namespace edgelm

#endif  // EDGELM_HPP_
