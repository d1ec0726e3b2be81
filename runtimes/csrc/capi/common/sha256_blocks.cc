#include "capi/common/sha256_blocks.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#if defined(__linux__)
#include <sys/auxv.h>
#endif
#endif

namespace edgelm::capi {

namespace {

constexpr std::uint32_t kRounds[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

std::uint32_t rotated(std::uint32_t value, int by) { return value >> by | value << (32 - by); }

inline void round(std::uint32_t a, std::uint32_t b, std::uint32_t c, std::uint32_t& d, std::uint32_t e, std::uint32_t f,
                  std::uint32_t g, std::uint32_t& h, std::uint32_t keyed) {
  const std::uint32_t s1 = rotated(e, 6) ^ rotated(e, 11) ^ rotated(e, 25);
  const std::uint32_t s0 = rotated(a, 2) ^ rotated(a, 13) ^ rotated(a, 22);
  h += s1 + ((e & f) ^ (~e & g)) + keyed;
  d += h;
  h += s0 + ((a & b) ^ (a & c) ^ (b & c));
}

void sha256_block(std::uint32_t* state, const unsigned char* block) {
  std::uint32_t w[64];
  for (int i = 0; i < 16; ++i) {
    const unsigned char* b = block + 4 * i;
    w[i] = std::uint32_t(b[0]) << 24 | std::uint32_t(b[1]) << 16 | std::uint32_t(b[2]) << 8 | b[3];
  }
  for (int i = 16; i < 64; ++i) {
    const std::uint32_t s0 = rotated(w[i - 15], 7) ^ rotated(w[i - 15], 18) ^ w[i - 15] >> 3;
    const std::uint32_t s1 = rotated(w[i - 2], 17) ^ rotated(w[i - 2], 19) ^ w[i - 2] >> 10;
    w[i] = w[i - 16] + s0 + w[i - 7] + s1;
  }
  std::uint32_t a = state[0], b = state[1], c = state[2], d = state[3];
  std::uint32_t e = state[4], f = state[5], g = state[6], h = state[7];
  // Every round renames the words; after eight the names are the first again.
  for (int i = 0; i < 64; i += 8) {
    round(a, b, c, d, e, f, g, h, kRounds[i] + w[i]);
    round(h, a, b, c, d, e, f, g, kRounds[i + 1] + w[i + 1]);
    round(g, h, a, b, c, d, e, f, kRounds[i + 2] + w[i + 2]);
    round(f, g, h, a, b, c, d, e, kRounds[i + 3] + w[i + 3]);
    round(e, f, g, h, a, b, c, d, kRounds[i + 4] + w[i + 4]);
    round(d, e, f, g, h, a, b, c, kRounds[i + 5] + w[i + 5]);
    round(c, d, e, f, g, h, a, b, kRounds[i + 6] + w[i + 6]);
    round(b, c, d, e, f, g, h, a, kRounds[i + 7] + w[i + 7]);
  }
  const std::uint32_t v[8] = {a, b, c, d, e, f, g, h};
  for (int i = 0; i < 8; ++i) state[i] += v[i];
}

#if defined(__x86_64__)

__attribute__((target("sha,sse4.1"))) void fast_blocks(std::uint32_t* state, const unsigned char* data,
                                                       std::size_t count) {
  const auto load = [](const void* from) { return _mm_loadu_si128(static_cast<const __m128i*>(from)); };
  const __m128i swapped = _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203);
  // The instructions want the state's words as ABEF and CDGH.
  __m128i first = _mm_shuffle_epi32(load(state), 0xb1), cdgh = _mm_shuffle_epi32(load(state + 4), 0x1b);
  __m128i abef = _mm_alignr_epi8(first, cdgh, 8);
  cdgh = _mm_blend_epi16(cdgh, first, 0xf0);
  for (; count > 0; --count, data += 64) {
    const __m128i before_abef = abef, before_cdgh = cdgh;
    __m128i words[4];
    for (int i = 0; i < 16; ++i) {
      __m128i& next = words[i % 4];
      if (i < 4) {
        next = _mm_shuffle_epi8(load(data + 16 * i), swapped);
      } else {
        const __m128i last = words[(i + 3) % 4];
        const __m128i seventh = _mm_alignr_epi8(last, words[(i + 2) % 4], 4);
        next = _mm_sha256msg2_epu32(_mm_add_epi32(_mm_sha256msg1_epu32(next, words[(i + 1) % 4]), seventh), last);
      }
      const __m128i keyed = _mm_add_epi32(next, load(kRounds + 4 * i));
      cdgh = _mm_sha256rnds2_epu32(cdgh, abef, keyed);
      abef = _mm_sha256rnds2_epu32(abef, cdgh, _mm_shuffle_epi32(keyed, 0x0e));
    }
    abef = _mm_add_epi32(abef, before_abef);
    cdgh = _mm_add_epi32(cdgh, before_cdgh);
  }
  first = _mm_shuffle_epi32(abef, 0x1b);
  cdgh = _mm_shuffle_epi32(cdgh, 0xb1);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(state), _mm_blend_epi16(first, cdgh, 0xf0));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(state + 4), _mm_alignr_epi8(cdgh, first, 8));
}

bool has_fast_blocks() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  const bool sse41 = __get_cpuid(1, &a, &b, &c, &d) != 0 && (c >> 19 & 1) != 0 && (c >> 9 & 1) != 0;  // and SSSE3
  return sse41 && __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (b >> 29 & 1) != 0;
}

#elif defined(__aarch64__)

#if defined(__clang__)
#define EDGELM_SHA2 __attribute__((target("sha2")))
#else
#define EDGELM_SHA2 __attribute__((target("+crypto")))
#endif

EDGELM_SHA2 void fast_blocks(std::uint32_t* state, const unsigned char* data, std::size_t count) {
  uint32x4_t abcd = vld1q_u32(state), efgh = vld1q_u32(state + 4);
  for (; count > 0; --count, data += 64) {
    const uint32x4_t before_abcd = abcd, before_efgh = efgh;
    uint32x4_t words[4];
    for (int i = 0; i < 16; ++i) {
      uint32x4_t& next = words[i % 4];
      if (i < 4) {
        next = vreinterpretq_u32_u8(vrev32q_u8(vld1q_u8(data + 16 * i)));
      } else {
        next = vsha256su1q_u32(vsha256su0q_u32(next, words[(i + 1) % 4]), words[(i + 2) % 4], words[(i + 3) % 4]);
      }
      const uint32x4_t keyed = vaddq_u32(next, vld1q_u32(kRounds + 4 * i)), old = abcd;
      abcd = vsha256hq_u32(abcd, efgh, keyed);
      efgh = vsha256h2q_u32(efgh, old, keyed);
    }
    abcd = vaddq_u32(abcd, before_abcd);
    efgh = vaddq_u32(efgh, before_efgh);
  }
  vst1q_u32(state, abcd);
  vst1q_u32(state + 4, efgh);
}

bool has_fast_blocks() {
#if defined(__linux__)
  return (getauxval(AT_HWCAP) >> 6 & 1) != 0;  // HWCAP_SHA2
#else
  return true;  // every CPU of Apple's
#endif
}

#endif

}  // namespace

void sha256_blocks(std::uint32_t* state, const unsigned char* data, std::size_t count) {
#if defined(__x86_64__) || defined(__aarch64__)
  static const bool fast = has_fast_blocks();
  if (fast) return fast_blocks(state, data, count);
#endif
  sha256_blocks_scalar(state, data, count);
}

void sha256_blocks_scalar(std::uint32_t* state, const unsigned char* data, std::size_t count) {
  for (; count > 0; --count, data += 64) sha256_block(state, data);
}

}  // namespace edgelm::capi
