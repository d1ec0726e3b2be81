// The compression function of SHA-256, with the CPU's instructions for it where it has them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace edgelm::capi {

// Take `count` blocks of 64 bytes into the state.
void sha256_blocks(std::uint32_t* state, const unsigned char* data, std::size_t count);
// The same without these instructions.
void sha256_blocks_scalar(std::uint32_t* state, const unsigned char* data, std::size_t count);

}  // namespace edgelm::capi
