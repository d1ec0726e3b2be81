// NumPy's PCG64 with its seeding, so that a seed draws the same tokens here and in Python.
#pragma once

#include <array>
#include <cstdint>

namespace edgelm::capi {

// As numpy.random.PCG64(seed): O'Neill's PCG XSL RR 128/64, seeded through numpy's SeedSequence.
class Pcg64 {
 public:
  explicit Pcg64(std::uint64_t seed) {
    const std::array<std::uint64_t, 4> words = seed_words(seed);
    increment_ = (joined(words[2], words[3]) << 1) | 1;
    step();
    state_ += joined(words[0], words[1]);
    step();
  }

  std::uint64_t next() {
    step();
    const auto high = std::uint64_t(state_ >> 64), mixed = high ^ std::uint64_t(state_);
    const auto turn = unsigned(high >> 58);
    return (mixed >> turn) | (mixed << ((64 - turn) % 64));
  }

  // A number in [0, 1) from the upper 53 bits.
  double uniform() { return double(next() >> 11) * 0x1p-53; }

 private:
  __extension__ using Wide = unsigned __int128;

  static Wide joined(std::uint64_t high, std::uint64_t low) { return Wide(high) << 64 | low; }

  void step() { state_ = state_ * joined(2549297995355413924u, 4865540595714422341u) + increment_; }

  // One step of the hash of numpy's SeedSequence.
  static std::uint32_t hashed(std::uint32_t value, std::uint32_t& constant, std::uint32_t factor) {
    value ^= constant;
    constant *= factor;
    value *= constant;
    return value ^ (value >> 16);
  }

  // SeedSequence(seed).generate_state(4, uint64)
  static std::array<std::uint64_t, 4> seed_words(std::uint64_t seed) {
    std::array<std::uint32_t, 4> pool = {std::uint32_t(seed), std::uint32_t(seed >> 32), 0, 0};
    std::uint32_t constant = 0x43b0d7e5;
    for (std::uint32_t& word : pool) word = hashed(word, constant, 0x931e8875);
    for (std::size_t from = 0; from < 4; ++from)
      for (std::size_t to = 0; to < 4; ++to)
        if (from != to) {
          const std::uint32_t mixed = 0xca01f9dd * pool[to] - 0x4973f715 * hashed(pool[from], constant, 0x931e8875);
          pool[to] = mixed ^ (mixed >> 16);
        }
    std::array<std::uint64_t, 4> words{};
    constant = 0x8b51f9dd;
    for (std::size_t i = 0; i < 8; ++i)
      words[i / 2] |= std::uint64_t(hashed(pool[i % 4], constant, 0x58f38ded)) << (32 * (i % 2));
    return words;
  }

  Wide state_ = 0, increment_ = 0;
};

}  // namespace edgelm::capi
