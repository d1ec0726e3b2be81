#include "capi/parity/parity.h"

#include <algorithm>

#include "capi/parity/diagnose.h"
#include "capi/parity/numbers/format.h"
#include "capi/parity/integrity.h"
#include "capi/parity/limits/noise.h"
#include "capi/parity/report.h"

namespace edgelm::capi {
namespace {

Check integrity_check(const Bundle& bundle, const ParityOptions& options) {
  Task task(options, "verifying", bundle_bytes(bundle));
  const std::vector<std::string> problems = damaged_files(bundle, [&](std::int64_t bytes) { task.advance(bytes); });
  std::string detail;
  for (std::size_t i = 0; i < std::min<std::size_t>(problems.size(), 8); ++i) detail += (i ? "; " : "") + problems[i];
  if (problems.empty()) detail = "every file has the hash it was exported with";
  return {"integrity", "Files: hashes", problems.empty(), detail};
}

// What the manifest and the pack disagree about; empty if nothing.
std::string incompatible(const ModelInfo& model, const ParityPack& pack) {
  if (pack.num_layers != model.num_layers) {
    return concat(pack.num_layers, " layers, the manifest says ", model.num_layers);
  }
  if (pack.num_experts != model.num_experts) {
    return concat(pack.num_experts, " experts, the manifest says ", model.num_experts);
  }
  const auto beyond = [&](const auto& ids) {
    return std::any_of(ids.begin(), ids.end(), [&](auto id) { return id >= model.vocab_size; });
  };
  if (beyond(pack.top_ids) || beyond(pack.probe_ids) || beyond(pack.ids) || beyond(pack.reference.best) ||
      (pack.quantized && beyond(pack.quantized->best))) {
    return concat("token ids beyond the vocabulary of ", model.vocab_size);
  }
  return "";
}

void add_limits_of_rounding(Limits& limits, std::vector<std::string>& notes, const Bundle& bundle,
                            const ParityPack& pack, const std::string& kv) {
  if (!pack.rounded || bundle.manifest().target != "cpu") return;
  const Limits fixed = limits;
  limits = rounding_limits(pack, fixed);
  const std::vector<std::string>& types = cache_types();
  const auto rank = [&](const std::string& type) {
    return std::find(types.begin(), types.end(), type) - types.begin();
  };
  if (!kv.empty() && rank(kv) > rank(pack.rounded->kv)) {
    // A coarser cache than the one that was simulated: no limit may be tighter than the fixed ones.
    const double top1 = std::min(limits.top1_clear, fixed.top1_clear);
    for (const LimitField& field : kLimitFields) {
      limits.*field.value = std::max(limits.*field.value, fixed.*field.value);
    }
    limits.top1_clear = top1;
    notes.push_back(concat("limits are wide: the KV cache is ", kv, ", coarser than the ", pack.rounded->kv,
                           " that they were made for"));
  }
  if (limits.logit_error > fixed.logit_error) {
    notes.push_back(
        "this model amplifies rounding: rounding activations and KV cache alone changes the log-probabilities so much "
        "that the limits of the logits are wide; those of the layers, in float32, are as tight as usual");
  }
}

Check prompts_check(const char* name, const char* title, const char* other, const std::vector<std::string>& wrong,
                    std::size_t count) {
  std::string names;
  for (const std::string& prompt : wrong) names += (names.empty() ? "" : ", ") + prompt;
  return {name, title, wrong.empty(), wrong.empty() ? concat(count, " prompts") : concat(other, names)};
}

std::vector<Check> tokenizer_checks(const Tokenizer& tokenizer, const ParityPack& pack) {
  std::vector<std::string> wrong, unread;
  for (const GoldenPrompt& prompt : pack.prompts) {
    const auto first = pack.ids.begin() + std::ptrdiff_t(prompt.start);
    const std::vector<TokenId> ids(first, first + std::ptrdiff_t(prompt.length));
    std::vector<TokenId> encoded = tokenizer.encode(prompt.text);
    encoded.resize(std::min(encoded.size(), ids.size()));
    if (encoded != ids) wrong.push_back(prompt.name);
    if (tokenizer.decode(ids) != prompt.decoded) unread.push_back(prompt.name);
  }
  std::vector<Check> checks = {
      prompts_check("tokenizer.encode", "Tokenizer: same ids for the prompts", "other ids for: ", wrong,
                    pack.prompts.size()),
      prompts_check("tokenizer.decode", "Tokenizer: same text for the ids", "other text for: ", unread,
                    pack.prompts.size()),
  };
  if (!pack.tokenizer) return checks;
  const std::int64_t size = tokenizer.size();
  std::string detail = grouped(size) + " tokens";
  bool same = false;
  if (size != pack.tokenizer->vocab_size) {
    detail += ", the checkpoint's tokenizer had " + grouped(pack.tokenizer->vocab_size);
  } else if (!(same = tokenizer.fingerprint() == pack.tokenizer->sha256)) {
    detail = "some ids decode to other texts, some texts have other ids, or special ids differ";
  }
  checks.push_back({"tokenizer.vocabulary", "Tokenizer: same vocabulary", same, detail});
  return checks;
}

// The tokenizer, nullptr if it cannot be loaded, and its checks.
std::unique_ptr<Tokenizer> check_tokenizer(const Bundle& bundle, const ParityPack& pack, std::vector<Check>& checks) {
  std::unique_ptr<Tokenizer> tokenizer;
  try {
    tokenizer = Tokenizer::open(bundle);
  } catch (const Error& error) {
    if (error.code != EDGELM_TOKENIZER && error.code != EDGELM_BUNDLE) throw;
    checks.push_back({"tokenizer", "Tokenizer: loads", false, error.what()});
    return nullptr;
  }
  for (Check& check : tokenizer_checks(*tokenizer, pack)) checks.push_back(std::move(check));
  return tokenizer;
}

template <class Items>
void append(std::vector<Items>& to, std::vector<Items> items) {
  to.insert(to.end(), std::make_move_iterator(items.begin()), std::make_move_iterator(items.end()));
}

}  // namespace

ParityResult check_parity(const std::string& path, const ParityOptions& options) {
  const Bundle bundle = Bundle::open(path);
  const std::string kind = kind_of(bundle.manifest().recipe_toml);
  Limits limits = limits_for(bundle.manifest(), kind);
  std::vector<Check> checks = {integrity_check(bundle, options)};
  const ParityPack pack = ParityPack::load(bundle.file("parity"));
  const std::string problem = incompatible(bundle.manifest().model, pack);
  if (!problem.empty()) {
    fail(EDGELM_BUNDLE, "the parity pack of ", bundle.path(), " belongs to another model (", problem,
         "): export the bundle again");
  }
  std::vector<std::string> notes;
  add_limits_of_rounding(limits, notes, bundle, pack, options.runtime.kv);
  const std::unique_ptr<Tokenizer> tokenizer = check_tokenizer(bundle, pack, checks);
  const DeviceRun run = run_device(bundle, pack, options);
  append(checks, logit_checks(pack, run.at_once, limits));
  append(checks, greedy_checks(pack, run.decoded, limits));
  std::optional<Diagnosis> diagnosis;
  if (run.trace) {
    diagnosis = diagnose(pack, *run.trace, limits);
    append(checks, layer_checks(pack, run.debug, *diagnosis, limits));
  }
  append(notes, run.notes);
  Findings findings = {bundle,
                       pack,
                       run,
                       limits,
                       tokenizer.get(),
                       kind,
                       std::move(checks),
                       std::move(diagnosis),
                       float_loss(pack, run.at_once, kind),
                       std::move(notes)};
  Json document = report(findings);
  return {passed(findings.checks), std::move(document)};
}

}  // namespace edgelm::capi
