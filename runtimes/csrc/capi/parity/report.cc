#include "capi/parity/report.h"

#include <algorithm>

#include "capi/parity/device/machine.h"

namespace edgelm::capi {
namespace {

// Numbers that are not finite become null.
Json number(double value) { return std::isfinite(value) ? Json(value) : Json(); }
template <class T>
Json maybe(const std::optional<T>& value) {
  return value ? Json(*value) : Json();
}
Json maybe(const std::optional<double>& value) { return value ? number(*value) : Json(); }
Json maybe(const std::string& text) { return text.empty() ? Json() : Json(text); }

template <class Items, class Convert>
Json list(const Items& items, const Convert& convert) {
  Json::Array result;
  for (const auto& item : items) result.push_back(convert(item));
  return result;
}

Json of_check(const Check& check) {
  return Json::Object{{"name", check.name},
                      {"title", check.title},
                      {"passed", maybe(check.passed)},
                      {"detail", check.detail},
                      {"value", maybe(check.value)},
                      {"limit", maybe(check.limit)},
                      {"better", check.higher ? "higher" : "lower"},
                      {"layer", maybe(check.layer)}};
}

Json of_loss(const FloatLoss& loss) {
  return Json::Object{{"known", loss.known},
                      {"kl", number(loss.kl)},
                      {"kl_reference", number(loss.kl_reference)},
                      {"perplexity", number(loss.perplexity)},
                      {"perplexity_reference", number(loss.perplexity_reference)},
                      {"warning", maybe(loss.warning)}};
}

Json of_layer(const LayerResult& layer) {
  return Json::Object{{"layer", layer.layer},
                      {"error", number(layer.error)},
                      {"error_float", number(layer.error_float)},
                      {"added", number(layer.added)},
                      {"worst", number(layer.worst)},
                      {"bad", layer.bad},
                      {"diverged", layer.diverged},
                      {"clear", number(layer.clear)},
                      {"near", number(layer.near)},
                      {"clear_count", layer.clear_count},
                      {"near_count", layer.near_count},
                      {"same_float", number(layer.same_float)},
                      {"severe_flips", layer.severe_flips}};
}

Json of_diagnosis(const std::optional<Diagnosis>& diagnosis) {
  if (!diagnosis) return {};
  return Json::Object{{"layers", list(diagnosis->layers, of_layer)},
                      {"embedding_error", number(diagnosis->embedding_error)},
                      {"first", maybe(diagnosis->first)},
                      {"cause", maybe(diagnosis->cause)},
                      {"experts_seen", diagnosis->experts_seen},
                      {"experts_total", diagnosis->experts_total}};
}

// The first wrong layer (-1: the embedding) and the cause, "PLACE: EVIDENCE"; null where not known.
std::pair<Json, Json> first_divergence(const Findings& found) {
  if (found.diagnosis && found.diagnosis->first) return {*found.diagnosis->first, maybe(found.diagnosis->cause)};
  const auto failed = [&](const std::string& prefix) {
    return std::any_of(found.checks.begin(), found.checks.end(), [&](const Check& check) {
      return check.passed == false && check.name.compare(0, prefix.size(), prefix) == 0;
    });
  };
  if (failed("head")) return {{}, "the final norm or output head: every layer agrees, the logits do not"};
  if (failed("logits.") || failed("perplexity.device")) {
    if (!found.diagnosis) return {};
    return {{},
            "the shipped graph: the debug graph, which reads the same weights, agrees in every layer, so a kernel that "
            "only the shipped graph uses is wrong on this device"};
  }
  if (failed("greedy.")) {
    return {
        {},
        "decoding with the KV cache: the same graph agrees where it computes all positions at once, so the cache or "
        "a kernel for single tokens is wrong on this device"};
  }
  return {};
}

Json of_prompt(const Findings& found, const GoldenPrompt& prompt, const Values& kl, const Values& kl_float) {
  const ReferenceRecord& want = found.pack.target();
  const std::vector<std::int64_t>& device = found.run.at_once.best;
  Json::Array kls, kls_float, same, chosen, of_float;
  for (std::int64_t i = prompt.start; i < prompt.start + prompt.fed(); ++i) {
    const std::size_t row = std::size_t(i);
    kls.push_back(number(kl[row]));
    kls_float.push_back(number(kl_float[row]));
    same.push_back(want.best[row] == device[row]);
  }
  const std::size_t first = std::size_t(prompt.first_greedy());
  const std::int64_t* tokens = found.run.decoded.best.data() + first;
  const std::vector<std::int64_t> greedy(prompt.greedy.begin(), prompt.greedy.end());
  const auto follow = [&](const std::int64_t* expected) {
    return greedy_prefix(expected, tokens, want.gap.data() + first, prompt.steps(), found.limits.clear_gap).prefix;
  };
  for (std::int64_t i = 0; i < prompt.steps(); ++i) {
    chosen.push_back(tokens[i]);
    of_float.push_back(greedy[std::size_t(i)]);
  }
  // From its first own choice on the device was still fed the reference's tokens: what it would write ends there.
  const std::int64_t own = std::min(follow(greedy.data()) + 1, prompt.steps());
  const std::string text = found.tokenizer ? found.tokenizer->decode({tokens, tokens + own}) : "";
  return Json::Object{
      {"name", prompt.name}, {"text", prompt.text},      {"length", prompt.length},
      {"kl", kls},           {"kl_float", kls_float},    {"top1_same", same},
      {"greedy", chosen},    {"greedy_float", of_float}, {"greedy_prefix", follow(want.best.data() + first)},
      {"greedy_text", text}};
}

Json of_speed(const DeviceRun& run) {
  const auto rate = [](std::int64_t tokens, double seconds) { return number(double(tokens) / seconds); };
  return Json::Object{{"load_s", number(run.load_seconds)},
                      {"prefill_tokens_per_s", rate(run.prefill_tokens, run.prefill_seconds)},
                      {"decode_tokens_per_s", rate(run.decode_tokens, run.decode_seconds)}};
}

Json of_model(const ModelInfo& model) {
  return Json::Object{{"family", model.family},
                      {"name", model.name},
                      {"hidden_size", model.hidden_size},
                      {"num_layers", model.num_layers},
                      {"num_heads", model.num_heads},
                      {"num_kv_heads", model.num_kv_heads},
                      {"head_dim", model.head_dim},
                      {"vocab_size", model.vocab_size},
                      {"context_length", model.context_length},
                      {"tied", model.tied},
                      {"num_experts", model.num_experts},
                      {"experts_per_token", model.experts_per_token},
                      {"norm_topk_prob", model.norm_topk_prob}};
}

std::string made_with(const ParityPack& pack) {
  std::string text;
  for (const auto& [key, value] : pack.made_with) text += concat(text.empty() ? "" : ", ", key, " ", value);
  return "from the parity pack, " + text;
}

}  // namespace

bool passed(const std::vector<Check>& checks) {
  return std::none_of(checks.begin(), checks.end(), [](const Check& check) { return check.passed == false; });
}

Json report(const Findings& found) {
  const ParityPack& pack = found.pack;
  const ReferenceRecord& want = pack.target();
  const LogitRecord& device = found.run.at_once;
  const Manifest& manifest = found.bundle.manifest();
  const Values kl = divergence(pack, want, device), kl_float = divergence(pack, pack.reference, device);
  const Mask clear = clear_positions(want, found.limits.clear_gap), text = pack.has_next();
  std::int64_t prefix = 0, total = 0;
  for (const GreedyResult& result : greedy_results(pack, found.run.decoded, found.limits)) {
    prefix += result.prefix;
    total += result.total;
  }
  const auto [first, cause] = first_divergence(found);
  return Json::Object{
      {"format", "edgelm-parity"},
      {"format_version", 1},
      {"bundle", found.bundle.path()},
      {"passed", passed(found.checks)},
      {"kind", found.kind},
      {"checks", list(found.checks, of_check)},
      {"kl_mean", number(mean(kl))},
      {"kl_p99", number(quantile(kl, 0.99))},
      {"kl_max", number(largest(kl))},
      {"float_kl_mean", number(mean(kl_float))},
      {"quantization_kl_mean", number(mean(divergence(pack, pack.reference, want)))},
      {"float_loss", of_loss(found.loss)},
      {"logit_error", number(mean(logit_errors(pack, want, device)))},
      {"top1", number(agreement(want.best, device.best))},
      {"top1_clear", number(agreement(want.best, device.best, &clear))},
      {"top1_float", number(agreement(pack.reference.best, device.best))},
      {"perplexity_float", number(perplexity(pack.reference, text))},
      {"perplexity_quantized", number(perplexity(want, text))},
      {"perplexity", number(perplexity(device, text))},
      {"greedy_prefix", prefix},
      {"greedy_total", total},
      {"positions", pack.count()},
      {"first_diverged_layer", first},
      {"cause", cause},
      {"diagnosis", of_diagnosis(found.diagnosis)},
      {"prompts", list(pack.prompts, [&](const GoldenPrompt& p) { return of_prompt(found, p, kl, kl_float); })},
      {"speed", of_speed(found.run)},
      {"threads", found.run.threads},
      {"runtime", found.run.runtime},
      {"device", describe_machine()},
      {"model", of_model(manifest.model)},
      {"recipe", manifest.recipe_name},
      {"source", *manifest.json.find("source")->find("id")},
      {"files", *manifest.json.find("files")},
      {"reference", made_with(pack)},
      {"tools", *manifest.json.find("tools")},
      {"notes", list(found.notes, [](const std::string& note) { return Json(note); })},
      {"ops", manifest.ops},
      {"kv", found.run.kv},
      {"isa", maybe(found.run.isa)},
      {"engine", maybe(found.run.engine)},
      {"resident_peak", maybe(found.run.resident_peak)},
      {"created", utc_now()},
      {"made_by", "libedgelm " EDGELM_VERSION},
  };
}

}  // namespace edgelm::capi
