// Checks of token ids, with the messages of edgelm/runtimes/base.py.
#pragma once

#include <cstddef>
#include <cstdint>

namespace edgelm::capi {

// Throws Error(EDGELM_INVALID_ARGUMENT) if there is no id, or one is outside the vocabulary.
void check_tokens(const std::int32_t* ids, std::size_t count, std::int64_t vocab_size);

// Throws Error(EDGELM_CONTEXT_FULL) if `count` more tokens do not fit after `position` cached ones.
void check_room(std::size_t count, std::int64_t position, std::int64_t context_length,
                std::int64_t model_context_length);

}  // namespace edgelm::capi
