// Uses every method of edgelm.hpp. Arguments: bundle, ONNX Runtime library, folder for a file.
#include <cstdlib>
#include <iostream>
#include <stdexcept>
#include <type_traits>

#include "edgelm.hpp"

namespace {

void expect(bool condition, const char* what) {
  if (condition) return;
  std::cerr << "failed: " << what << "\n";
  std::exit(1);
}

void texts(const edgelm::Model& model) {
  const std::vector<std::int32_t> ids = model.tokenize("import os");
  expect(model.detokenize(ids) == "import os", "text");
  expect(model.tokenize("x", false).size() + 1 >= model.tokenize("x").size(), "add_bos");
  edgelm::Detokenizer pieces = model.detokenizer();
  std::string joined;
  for (const std::int32_t id : ids) joined += pieces.push(id);
  joined += pieces.flush();
  expect(joined == "import os", "streamed text");
  const std::vector<edgelm::Message> messages = {{"user", "say \"hi\"\n\x01\\ 日本"}};
  const std::string prompt = model.render_chat(messages, R"({"a": 1})");
  expect(prompt.find(messages[0].content) != std::string::npos, "content of a message");
  expect(model.render_chat_json(edgelm::to_json(messages)) == prompt, "messages in JSON");
}

void generates(edgelm::Model& model) {
  std::string shown;
  edgelm::GenerateOptions options;
  options.max_tokens = 12;
  options.temperature = 0.9;
  options.top_k = 40;
  options.seed = 3;
  options.stop = {"@nowhere@", "@never@"};
  options.on_text = [&](std::string_view text) {
    shown += text;
    return true;
  };
  const edgelm::Generation first = model.generate("import os", options);
  expect(first.text() == shown && !shown.empty(), "streamed text of a generation");
  expect(first.tokens().size() == 12 && first.reason() == EDGELM_STOP_LENGTH, "tokens");
  expect(first.timings().decode_tokens_per_second() > 0 && first.timings().prefill_tokens_per_second() > 0, "timings");
  expect(first.get() != nullptr, "handle");
  options.on_text = nullptr;
  const edgelm::Generation again = model.generate(model.tokenize("import os"), options);
  expect(again.tokens() == first.tokens(), "the same seed");
  expect(model.generate("x", options).text().size() < 1000, "text of a temporary");
  expect(!model.chat({{"user", "Hello"}}, options).tokens().empty(), "chat");

  options.on_text = [](std::string_view) -> bool { throw std::out_of_range("mine"); };
  try {
    model.generate("import os", options);
    expect(false, "what the callback throws passes on");
  } catch (const std::out_of_range& error) {
    expect(error.what() == std::string("mine"), "the exception of the callback");
  }
  options.on_text = [](std::string_view) { return false; };
  options.max_tokens.reset();
  expect(model.generate("import os", options).reason() == EDGELM_STOP_INTERRUPTED, "the callback ends it");
  options.top_p = 2;
  try {
    model.generate("import os", options);
    expect(false, "top_p of 2");
  } catch (const edgelm::Error& error) {
    expect(error.code() == EDGELM_INVALID_ARGUMENT, "code of an error");
  }
}

void computes(edgelm::Model& model, const std::string& folder) {
  const std::vector<std::int32_t> ids = {5, 6, 7};
  const std::vector<float> all = model.logits(ids, 3);
  expect(all.size() == 3 * std::size_t(model.info().vocab_size), "logits");
  expect(model.cached_tokens() == 3, "cached tokens");
  model.save_session(folder + "/session");
  model.reset();
  expect(model.cached_tokens() == 0, "reset");
  model.load_session(folder + "/session");
  expect(model.cached_tokens() == 3, "session");
  model.cancel();
}

}  // namespace

int main(int argc, char** argv) try {
  static_assert(std::is_move_constructible_v<edgelm::Model> && !std::is_copy_constructible_v<edgelm::Model>);
  static_assert(std::is_move_assignable_v<edgelm::Generation> && !std::is_copy_constructible_v<edgelm::Generation>);
  expect(argc == 4 && edgelm::abi_version() == EDGELM_ABI_VERSION && !edgelm::version().empty(), "arguments");
  edgelm::OpenOptions options;
  options.onnxruntime = argv[2];
  options.threads = 2;
  options.context_length = 256;
  options.kv = "int8";
  edgelm::Model opened(argv[1], options);
  edgelm::Model model = std::move(opened);
  expect(model.info().kv == std::string("int8") && model.info().context_length == 256, "options of opening");
  texts(model);
  generates(model);
  computes(model, argv[3]);
  int steps = 0;
  edgelm::ParityOptions checked;
  checked.onnxruntime = argv[2];
  checked.skip_layers = true;
  checked.on_progress = [&](std::string_view, std::int64_t, std::int64_t) { return ++steps > 0; };
  const edgelm::ParityResult result = edgelm::parity(argv[1], checked);
  expect(result.passed && steps > 0 && result.report.front() == '{', "parity");
  checked.on_progress = [](std::string_view, std::int64_t, std::int64_t) -> bool { throw std::out_of_range("mine"); };
  try {
    edgelm::parity(argv[1], checked);
    expect(false, "what the callback throws passes on");
  } catch (const std::out_of_range&) {
    std::cout << "all methods work\n";
  }
} catch (const edgelm::Error& error) {
  std::cerr << "error " << error.code() << ": " << error.what() << "\n";
  return 1;
}
