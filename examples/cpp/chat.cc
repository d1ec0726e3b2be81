// Chat with a model in a terminal. Answers appear as they are generated; Ctrl-C ends an answer, an empty line the chat.
//
//   chat BUNDLE                    a conversation
//   chat BUNDLE PROMPT [TOKENS]    continue one text, then exit
//
// ONNX Runtime's library is found by EDGELM_ONNXRUNTIME=PATH, beside libedgelm, or where the system finds it.
#include <csignal>
#include <iostream>
#include <string>
#include <vector>

#include <edgelm/edgelm.hpp>

namespace {

volatile std::sig_atomic_t interrupted = 0;

// Write a part of the text; false, after Ctrl-C, ends the answer.
bool show(std::string_view text) {
  std::cout << text << std::flush;
  return interrupted == 0;
}

void print_speed(const edgelm::Generation& answer) {
  const edgelm::Timings timings = answer.timings();
  std::cerr << "[" << answer.tokens().size() << " tokens, the first after " << timings.time_to_first_token
            << " s, then " << timings.decode_tokens_per_second() << " per second]\n";
}

int complete(edgelm::Model& model, const std::string& prompt, int tokens) {
  edgelm::GenerateOptions options;
  options.max_tokens = tokens;
  options.on_text = show;
  const edgelm::Generation result = model.generate(prompt, options);
  std::cout << "\n";
  print_speed(result);
  return interrupted != 0;
}

int chat(edgelm::Model& model) {
  const edgelm_model_info info = model.info();
  if (!info.has_chat_template) {
    std::cerr << "error: " << info.name << " has no chat template: give it a text to continue\n";
    return 1;
  }
  std::cerr << info.name << ", " << info.recipe << ", " << info.context_length << " tokens of context\n";
  std::vector<edgelm::Message> messages;
  edgelm::GenerateOptions options;
  options.temperature = 0.7;
  options.top_p = 0.9;
  options.on_text = show;
  std::string line;
  while (std::cerr << "> " && std::getline(std::cin, line) && !line.empty()) {
    messages.push_back({"user", line});
    interrupted = 0;
    try {
      // The conversation so far is in the KV cache: only what is new is computed.
      const edgelm::Generation answer = model.chat(messages, options);
      std::cout << "\n";
      print_speed(answer);
      messages.push_back({"assistant", std::string(answer.text())});
    } catch (const edgelm::Error& error) {
      if (error.code() != EDGELM_CONTEXT_FULL || messages.size() < 3) throw;
      std::cerr << "the conversation has become too long: its first question and answer are forgotten, ask again\n";
      messages.pop_back();
      messages.erase(messages.begin(), messages.begin() + 2);
    }
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2 || argc > 4) {
    std::cerr << "usage: chat BUNDLE [PROMPT [TOKENS]]\n";
    return 2;
  }
  std::signal(SIGINT, [](int) { interrupted = 1; });
  try {
    edgelm::Model model(argv[1]);
    return argc == 2 ? chat(model) : complete(model, argv[2], argc == 4 ? std::stoi(argv[3]) : 64);
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << "\n";
    return 1;
  }
}
