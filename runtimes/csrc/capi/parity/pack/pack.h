// The parity pack: what the reference computed, stored in the bundle. As edgelm/parity/pack.py, which describes it.
//
// Letters: N positions, T recorded tokens, P probes, L layers, E experts, k chosen experts.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "capi/common/json.h"

namespace edgelm::capi {

constexpr std::int64_t kSketchWidth = 64;

// Types of the KV cache that a pack may simulate, from the finest to the coarsest.
const std::vector<std::string>& cache_types();

// Where one prompt lies in the pack's arrays.
struct GoldenPrompt {
  std::string name, text, decoded;
  std::int64_t start, length;        // first position, and number of tokens
  std::vector<std::int32_t> greedy;  // the float reference's continuation, maybe empty

  // Tokens that are fed: the prompt, and the continuation without its last token.
  std::int64_t fed() const { return length + (greedy.empty() ? 0 : std::int64_t(greedy.size()) - 1); }
  // The position whose logits choose the first token of the continuation; the next ones choose the others.
  std::int64_t first_greedy() const { return start + length - 1; }
  std::int64_t steps() const { return std::int64_t(greedy.size()); }
};

// Logits at recorded tokens: a reference's, or those of a device.
struct LogitValues {
  std::vector<float> top_logits;    // [N, T] at the pack's top_ids
  std::vector<float> probe_logits;  // [N, P] at the pack's probe_ids
  std::vector<float> next_logit;    // [N] of the next token; without meaning where has_next is false
  std::vector<double> logsumexp;    // [N] over the whole vocabulary
  std::vector<std::int64_t> best;   // [N] token with the largest logit
};

struct ReferenceRecord : LogitValues {
  std::vector<float> gap;             // [N] largest logit minus the second
  std::vector<float> norms;           // [L + 1, N] of hidden.0 ... hidden.L
  std::vector<float> sketches;        // [L + 1, N, 64]
  std::vector<float> router;          // [L, N, E] logits; empty for a dense model
  std::vector<std::int32_t> experts;  // [L, N, k] by falling weight
  std::int64_t chosen = 0;            // k
};

// The target reference with activations and KV cache rounded as on the device, at M positions.
struct RoundedRecord : LogitValues {
  std::vector<std::int64_t> rows;  // [M] positions
  std::vector<bool> flipped;       // [M] whether some layer chose other experts
  std::string kv;                  // type of the KV cache
};

struct TokenizerPrint {
  std::int64_t vocab_size;
  std::string sha256;
};

struct ParityPack {
  std::vector<GoldenPrompt> prompts;
  std::vector<std::int32_t> ids;        // [N]
  std::vector<std::int32_t> top_ids;    // [N, T]
  std::vector<std::int32_t> probe_ids;  // [P]
  ReferenceRecord reference;
  std::optional<ReferenceRecord> quantized;  // none if nothing was quantised
  std::optional<TokenizerPrint> tokenizer;
  std::optional<RoundedRecord> rounded;
  std::vector<std::pair<std::string, std::string>> made_with;
  std::uint64_t sketch_seed = 0;
  std::int64_t num_layers = 0, num_experts = 0, top = 0;

  std::int64_t count() const { return std::int64_t(ids.size()); }
  std::int64_t probes() const { return std::int64_t(probe_ids.size()); }
  // The reference with the bundle's weights, which the device must reproduce.
  const ReferenceRecord& target() const { return quantized ? *quantized : reference; }
  // Whether the next token belongs to the prompt, and the token that is fed next, 0 if none is; [N].
  std::vector<bool> has_next() const;
  std::vector<std::int32_t> next_ids() const;

  // Read the folder's pack.json and pack.npz. Throws Error(EDGELM_BUNDLE) if a file is missing, damaged, of a newer
  // format, or its arrays do not fit together. Sizes are checked before memory is allocated.
  static ParityPack load(const std::string& folder);
};

}  // namespace edgelm::capi
