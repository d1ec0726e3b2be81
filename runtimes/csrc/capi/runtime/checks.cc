#include "capi/runtime/checks.h"

#include "capi/common/error.h"

namespace edgelm::capi {

void check_tokens(const std::int32_t* ids, std::size_t count, std::int64_t vocab_size) {
  if (count == 0) fail(EDGELM_INVALID_ARGUMENT, "no tokens to append: give at least one token id");
  for (std::size_t i = 0; i < count; ++i)
    if (ids[i] < 0 || ids[i] >= vocab_size)
      fail(EDGELM_INVALID_ARGUMENT, "token id ", ids[i], " (number ", i, " of ", count,
           ") is outside the vocabulary 0..", vocab_size - 1, ": was it made by another model's tokenizer?");
}

void check_room(std::size_t count, std::int64_t position, std::int64_t context_length,
                std::int64_t model_context_length) {
  const std::int64_t room = context_length - position;
  if (count <= std::uint64_t(room)) return;
  const std::string used = position > 0 ? concat(", ", position, " are taken") : "";
  const std::string larger = context_length < model_context_length
                                 ? concat(" or open with a larger context_length (the model's limit is ",
                                          model_context_length, ")")
                                 : concat(": ", model_context_length, " is the model's own limit");
  fail(EDGELM_CONTEXT_FULL, count, " tokens do not fit: the context holds ", context_length, used, ", so ", room,
       " fit. Shorten the text", larger);
}

}  // namespace edgelm::capi
