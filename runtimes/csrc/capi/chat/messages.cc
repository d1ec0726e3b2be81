#include "capi/chat/messages.h"

#include "capi/chat/values/text.h"

namespace edgelm::capi::chat {

namespace {

template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  fail(EDGELM_INVALID_ARGUMENT, parts...);
}

bool is_text(const Json* json) { return json != nullptr && json->is_string(); }

void check_parts(std::size_t message, const Json::Array& parts) {
  for (std::size_t i = 0; i < parts.size(); ++i) {
    const Json* kind = parts[i].find("type");
    if (is_text(kind) && kind->string() != "text") {
      refuse("message ", message, ": part ", i, " of its content is of type ", repr_of_text(kind->string()),
             ": models here read text only");
    }
    if (kind == nullptr || kind->is_null() || !is_text(parts[i].find("text"))) {
      refuse("message ", message, ": part ", i,
             " of its content must be like {\"type\": \"text\", \"text\": \"Hello\"}");
    }
  }
}

bool is_message(std::size_t number, const Json& message) {
  const Json* role = message.find("role");
  if (!is_text(role)) return false;
  const Json* content = message.find("content");
  const bool empty = content == nullptr || content->is_null();
  // A tool's answer may have any type.
  if (role->string() == "tool" || role->string() == "ipython" || role->string() == "function") return !empty;
  if (!empty && content->is_array()) {
    check_parts(number, content->array());
    return !content->array().empty();
  }
  if (!empty) return content->is_string();
  const Json* calls = message.find("tool_calls");
  if (calls == nullptr || calls->is_null()) return false;
  if (calls->is_array()) return !calls->array().empty();
  if (calls->is_object()) return !calls->object().empty();
  if (calls->is_string()) return !calls->string().empty();
  return calls->is_bool() ? calls->boolean() : calls->number() != 0;
}

// The texts of a list of parts, one in a line; `content` itself if it is something else.
Json joined_parts(const Json& content) {
  if (!content.is_array() || content.array().empty()) return content;
  std::string text;
  for (const Json& part : content.array()) {
    const Json *kind = part.find("type"), *own = part.find("text");
    if (!is_text(kind) || kind->string() != "text" || !is_text(own)) return content;
    if (&part != &content.array().front()) text += '\n';
    text += own->string();
  }
  return text;
}

Json checked(const Json& message, bool joined) {
  Json::Object kept;
  const Json* reasoning = nullptr;
  for (const char* key : {"reasoning_content", "thinking", "reasoning"}) {
    const Json* value = message.find(key);
    if (reasoning == nullptr && value != nullptr && !value->is_null()) reasoning = value;
  }
  // As in Python: "thinking" comes first if it is new, and all of transformers' keys are there.
  if (reasoning != nullptr) {
    const Json* thinking = message.find("thinking");
    kept.emplace_back("thinking", thinking != nullptr && !thinking->is_null() ? *thinking : *reasoning);
  }
  for (const auto& [key, value] : message.object()) {
    if (value.is_null() || (reasoning != nullptr && key == "thinking")) continue;
    kept.emplace_back(key, joined && key == "content" ? joined_parts(value) : value);
  }
  Json result(std::move(kept));
  if (reasoning != nullptr) result.set("reasoning_content", *reasoning);
  return result;
}

}  // namespace

Json checked_messages(const Json& messages, bool joined) {
  if (!messages.is_array() || messages.array().empty()) {
    refuse("messages must be a list such as [{\"role\": \"user\", \"content\": \"Hello\"}]");
  }
  Json::Array result;
  for (std::size_t i = 0; i < messages.array().size(); ++i) {
    const Json& message = messages.array()[i];
    if (!is_message(i, message)) {
      refuse(
          "message ", i,
          " must be like {\"role\": \"user\", \"content\": \"Hello\"}, texts both, the content perhaps a list of parts "
          "{\"type\": \"text\", \"text\": \"Hello\"}");
    }
    result.push_back(checked(message, joined));
  }
  return result;
}

}  // namespace edgelm::capi::chat
