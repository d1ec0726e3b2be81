#include "capi/generation/model.h"

#include <algorithm>
#include <exception>
#include <future>
#include <set>

#include "capi/common/error.h"
#include "capi/common/files.h"
#include "capi/generation/continuation.h"
#include "capi/generation/prefix_cache.h"
#include "capi/generation/session.h"
#include "capi/generation/turns.h"
#include "capi/runtime/checks.h"

namespace edgelm::capi {
namespace {

// What reading the tokenizer and the chat template gave. One of them may fail without the other.
struct TextParts {
  std::shared_ptr<const Tokenizer> tokenizer;
  std::exception_ptr tokenizer_error;
  std::string problem;  // message of `tokenizer_error`
  bool has_template = false;
  std::unique_ptr<const ChatTemplate> chat_template;
  std::exception_ptr template_error;
};

void open_template(const Bundle& bundle, TextParts& parts) {
  const Members description(parts.tokenizer->settings(), bundle.file("tokenizer.edgelm.json"), EDGELM_BUNDLE);
  parts.has_template = description.has("chat_template");
  if (!parts.has_template)
    fail(EDGELM_TEMPLATE, bundle.path(),
         ": no chat template: this is a base model, or its template was not copied; use a plain prompt");
  std::vector<std::pair<std::string, std::string>> special;
  if (description.has("special_tokens")) {
    const Members tokens = description.object("special_tokens");
    for (const auto& [name, value] : tokens.json().object()) special.emplace_back(name, tokens.string(name));
  }
  parts.chat_template = std::make_unique<const ChatTemplate>(description.string("chat_template"), std::move(special));
}

TextParts open_text(const Bundle& bundle) {
  TextParts parts;
  try {
    parts.tokenizer = Tokenizer::open(bundle);
  } catch (const std::exception& error) {
    parts.tokenizer_error = parts.template_error = std::current_exception();
    parts.problem = error.what();
    return parts;
  }
  try {
    open_template(bundle, parts);
  } catch (const std::exception&) {
    parts.template_error = std::current_exception();
  }
  return parts;
}

}  // namespace

struct Model::State {
  State(const std::string& path, const RuntimeOptions& options)
      : bundle(Bundle::open(path)),
        text(std::async(std::launch::async | std::launch::deferred, [this] { return open_text(bundle); })),
        runtime(open_runtime(bundle, options)),
        cache(*runtime),
        turns([this] { runtime->resume(); }, [this] { runtime->cancel(); }),
        end_ids(bundle.manifest().eos_ids.begin(), bundle.manifest().eos_ids.end()) {}

  const TextParts& parts() const { return text.get(); }

  Generation generate(std::vector<TokenId> prompt, const GenerateOptions& options, Clock::time_point started) {
    if (prompt.empty())
      fail(EDGELM_INVALID_ARGUMENT, "the prompt is empty and the model has no token to begin with: give some text");
    check_tokens(prompt.data(), prompt.size(), runtime->vocab_size);
    check_room(prompt.size(), 0, runtime->context_length, runtime->model_context_length);
    if (!options.stop.empty() && parts().tokenizer_error) std::rethrow_exception(parts().tokenizer_error);
    Continuation answer(std::move(prompt), options, parts().tokenizer, end_ids, *runtime, started);
    const Turn turn(turns);
    return answer.run(*runtime, cache, turn);
  }

  SessionOf session(const Turn& turn) {
    Sha256 hash;
    hash.update(bundle.manifest().json.dump());
    return {*runtime, cache, hash.hex(), [&turn] { turn.check(); }};
  }

  const Bundle bundle;
  std::shared_future<TextParts> text;
  std::unique_ptr<Runtime> runtime;
  PrefixCache cache;
  Turns turns;
  std::set<std::int64_t> end_ids;
};

Model::Model(const std::string& path, const RuntimeOptions& options) : state_(new State(path, options)) {}
Model::~Model() = default;

const Bundle& Model::bundle() const { return state_->bundle; }
const Runtime& Model::runtime() const { return *state_->runtime; }

std::shared_ptr<const Tokenizer> Model::tokenizer() const {
  const TextParts& parts = state_->parts();
  if (parts.tokenizer_error) std::rethrow_exception(parts.tokenizer_error);
  return parts.tokenizer;
}

const char* Model::tokenizer_problem() const {
  const TextParts& parts = state_->parts();
  return parts.tokenizer_error ? parts.problem.c_str() : nullptr;
}

bool Model::has_chat_template() const { return state_->parts().has_template; }

std::string Model::render_chat(const Json& messages, const Json& variables, bool add_generation_prompt) const {
  const TextParts& parts = state_->parts();
  if (parts.template_error) std::rethrow_exception(parts.template_error);
  return parts.chat_template->render(messages, add_generation_prompt, variables);
}

Generation Model::generate(const std::vector<TokenId>& prompt, const GenerateOptions& options) {
  return state_->generate(prompt, options, Clock::now());
}

Generation Model::generate(std::string_view prompt, const GenerateOptions& options) {
  const auto started = Clock::now();
  return state_->generate(tokenizer()->encode(prompt), options, started);
}

Generation Model::chat(const Json& messages, const GenerateOptions& options) {
  const auto started = Clock::now();
  // The template writes all special tokens, bos included.
  return state_->generate(tokenizer()->encode(render_chat(messages, {}, true), false), options, started);
}

void Model::logits(const std::vector<TokenId>& ids, std::size_t positions, float* logits) {
  State& state = *state_;
  const Runtime& runtime = *state.runtime;
  check_tokens(ids.data(), ids.size(), runtime.vocab_size);
  check_room(ids.size(), 0, runtime.context_length, runtime.model_context_length);
  if (positions < 1 || positions > ids.size())
    fail(EDGELM_INVALID_ARGUMENT, "positions is ", positions, ": give 1 to ", ids.size(), ", the number of tokens");
  const Turn turn(state.turns);
  state.cache.logits_of_last(ids, positions, [&](const float* block, std::int64_t rows) {
    logits = std::copy(block, block + rows * runtime.vocab_size, logits);
  });
}

void Model::save_session(const std::string& path) {
  const Turn turn(state_->turns);
  capi::save_session(state_->session(turn), path);
}

void Model::load_session(const std::string& path) {
  const Turn turn(state_->turns);
  capi::load_session(state_->session(turn), path);
}

void Model::reset() {
  const Turn turn(state_->turns);
  state_->cache.replace({}, {}, 0);
  state_->runtime->truncate(0);
}

std::int64_t Model::cached_tokens() {
  const Turn turn(state_->turns);
  return state_->runtime->position();
}

void Model::cancel() { state_->turns.cancel(); }
void Model::close() { state_->turns.close(); }

}  // namespace edgelm::capi
