#include <queue>
#include <unordered_map>

#include "capi/tokenizer/pieces/piece_encoder.h"

namespace edgelm::capi {

namespace {

constexpr std::uint32_t kNone = static_cast<std::uint32_t>(-1);

// A part of the text, in a list; merged ones become empty.
struct Symbol {
  std::uint32_t start, size, previous, next;
  bool fixed;  // user-defined: never merged
};

struct Pair {
  std::uint32_t left, right, size;
  float score;
};

// As in the library, whose order of equal pairs depends on the queue's algorithm, which is the same here.
struct IsLower {
  bool operator()(const Pair& a, const Pair& b) const {
    return a.score < b.score || (a.score == b.score && a.left > b.left);
  }
};

class MergingEncoder : public PieceEncoder {
 public:
  MergingEncoder(const PieceModel& model, const PrefixIndex& user_defined, bool by_id)
      : model_(model), user_defined_(user_defined), by_id_(by_id) {}

  std::vector<PieceMatch> operator()(std::string_view text) const override;

 private:
  // One text being encoded.
  struct Work {
    std::string_view text;
    std::vector<Symbol> symbols;
    std::priority_queue<Pair, std::vector<Pair>, IsLower> queue;
    // Sizes of the left parts of unused pieces, which are split again at the end.
    std::unordered_map<std::string_view, std::uint32_t> parts;
  };

  void cut(Work& work) const;
  void add_pair(Work& work, std::uint32_t left, std::uint32_t right) const;
  void merge(Work& work, const Pair& pair) const;
  void append(const Work& work, std::string_view part, std::vector<PieceMatch>& result) const;
  bool is_unused(std::uint32_t id) const { return !by_id_ && model_.kind(id) == PieceKind::kUnused; }

  const PieceModel& model_;
  const PrefixIndex& user_defined_;
  const bool by_id_;
};

void MergingEncoder::cut(Work& work) const {
  for (std::size_t at = 0; at < work.text.size();) {
    std::uint32_t value;
    std::size_t size = user_defined_.empty() ? 0 : user_defined_.longest(work.text, at, value);
    const bool fixed = size != 0;
    if (!fixed) size = character_size(work.text, at);
    const std::uint32_t index = static_cast<std::uint32_t>(work.symbols.size());
    work.symbols.push_back({static_cast<std::uint32_t>(at), static_cast<std::uint32_t>(size),
                            index == 0 ? kNone : index - 1, index + 1, fixed});
    at += size;
  }
  work.symbols.back().next = kNone;
}

void MergingEncoder::add_pair(Work& work, std::uint32_t left, std::uint32_t right) const {
  if (left == kNone || right == kNone) return;
  const Symbol &a = work.symbols[left], &b = work.symbols[right];
  if (a.fixed || b.fixed) return;
  const std::string_view name = work.text.substr(a.start, a.size + b.size);
  const auto id = model_.find(name);
  if (!id) return;
  const float score = by_id_ ? -static_cast<float>(*id) : model_.score(*id);
  work.queue.push({left, right, a.size + b.size, score});
  if (is_unused(*id)) work.parts[name] = a.size;
}

void MergingEncoder::merge(Work& work, const Pair& pair) const {
  Symbol &left = work.symbols[pair.left], &right = work.symbols[pair.right];
  if (left.size == 0 || right.size == 0 || left.size + right.size != pair.size) return;  // merged in another way
  left.size += right.size;
  left.next = right.next;
  if (right.next != kNone) work.symbols[right.next].previous = pair.left;
  right.size = 0;
  add_pair(work, left.previous, pair.left);
  add_pair(work, pair.left, left.next);
}

void MergingEncoder::append(const Work& work, std::string_view part, std::vector<PieceMatch>& result) const {
  std::vector<std::string_view> todo = {part};
  while (!todo.empty()) {
    part = todo.back();
    todo.pop_back();
    const std::uint32_t id = model_.id_of(part);
    const auto found = is_unused(id) ? work.parts.find(part) : work.parts.end();
    if (!is_unused(id)) {
      result.push_back({part, id});
    } else if (found == work.parts.end()) {
      result.push_back({part, model_.unknown_id()});  // a single character
    } else {
      todo.push_back(part.substr(found->second));
      todo.push_back(part.substr(0, found->second));
    }
  }
}

std::vector<PieceMatch> MergingEncoder::operator()(std::string_view text) const {
  if (text.size() > INT32_MAX) fail(EDGELM_TOKENIZER, "a text of ", text.size(), " bytes is too long");
  Work work;
  work.text = text;
  cut(work);
  for (std::uint32_t i = 1; i < work.symbols.size(); ++i) add_pair(work, i - 1, i);
  while (!work.queue.empty()) {
    const Pair pair = work.queue.top();
    work.queue.pop();
    merge(work, pair);
  }
  std::vector<PieceMatch> result;
  for (std::uint32_t i = 0; i != kNone; i = work.symbols[i].next) {
    append(work, text.substr(work.symbols[i].start, work.symbols[i].size), result);
  }
  return result;
}

}  // namespace

std::unique_ptr<PieceEncoder> make_merging_encoder(const PieceModel& model, const PrefixIndex& user_defined,
                                                   bool by_id) {
  return std::make_unique<MergingEncoder>(model, user_defined, by_id);
}

}  // namespace edgelm::capi
