// From the parts of a regular expression to a program.
#include <algorithm>

#include "capi/tokenizer/regex/parser.h"

namespace edgelm::capi {

namespace {

using Instruction = Regex::Instruction;

constexpr std::size_t kMaxProgram = 100000;

}  // namespace

bool RegexParser::may_be_empty(const Node& node) {
  switch (node.kind) {
    case Node::kClass: return false;
    case Node::kJoin: return std::all_of(node.parts.begin(), node.parts.end(), may_be_empty);
    case Node::kChoice: return std::any_of(node.parts.begin(), node.parts.end(), may_be_empty);
    case Node::kRepeat: return node.low == 0 || may_be_empty(node.parts[0]);
    case Node::kGroup: return node.assertion != Instruction::kAtomic || may_be_empty(node.parts[0]);
    default: return true;
  }
}

std::uint32_t RegexParser::width(const Node& node) const {
  std::uint32_t sum = 0;
  switch (node.kind) {
    case Node::kClass: return 1;
    case Node::kJoin:
      for (const Node& part : node.parts) sum += width(part);
      return sum;
    case Node::kChoice:
      sum = width(node.parts[0]);
      for (const Node& part : node.parts) {
        if (width(part) != sum) refuse("alternatives of different lengths in (?<=");
      }
      return sum;
    case Node::kRepeat:
      if (node.low != node.high) refuse("a repetition in (?<=");
      return node.low * width(node.parts[0]);
    case Node::kGroup: return node.assertion == Instruction::kAtomic ? width(node.parts[0]) : 0;
    default: return 0;
  }
}

std::uint32_t RegexParser::put(Instruction instruction) {
  if (program.size() >= kMaxProgram) refuse("its repetitions are too large");
  program.push_back(instruction);
  return static_cast<std::uint32_t>(program.size() - 1);
}

void RegexParser::emit(const Node& node) {
  switch (node.kind) {
    case Node::kEmpty: return;
    case Node::kClass: put({Instruction::kClass, node.index}); return;
    case Node::kAssert: put({node.assertion}); return;
    case Node::kRepeat: return emit_repeat(node);
    case Node::kJoin:
      for (const Node& part : node.parts) emit(part);
      return;
    case Node::kGroup: {
      Instruction begin{node.assertion};
      const bool behind = node.assertion == Instruction::kBehind || node.assertion == Instruction::kNotBehind;
      if (behind) begin.low = width(node.parts[0]);
      const std::uint32_t at = put(begin);
      emit(node.parts[0]);
      put({Instruction::kEnd});
      program[at].x = static_cast<std::uint32_t>(program.size());
      return;
    }
    case Node::kChoice: {
      std::vector<std::uint32_t> jumps;
      for (std::size_t i = 0; i + 1 < node.parts.size(); ++i) {
        const std::uint32_t split = put({Instruction::kSplit});
        program[split].x = static_cast<std::uint32_t>(program.size());
        emit(node.parts[i]);
        jumps.push_back(put({Instruction::kJump}));
        program[split].y = static_cast<std::uint32_t>(program.size());
      }
      emit(node.parts.back());
      for (const std::uint32_t jump : jumps) program[jump].x = static_cast<std::uint32_t>(program.size());
      return;
    }
  }
}

void RegexParser::emit_repeat(const Node& node) {
  const Node& body = node.parts[0];
  const Node* single = &body;
  while (single->kind == Node::kJoin && single->parts.size() == 1) single = &single->parts[0];
  if (single->kind == Node::kClass && !node.lazy) {
    const auto kind = node.possessive ? Instruction::kAtomicRepeat : Instruction::kRepeat;
    put({kind, single->index, 0, node.low, node.high});
    return;
  }
  // Oniguruma leaves a loop when its body has matched nothing, even before `low`.
  if (node.high > 1 && may_be_empty(body)) refuse("a repetition of what may be empty");
  const std::uint32_t atomic = node.possessive ? put({Instruction::kAtomic}) : 0;
  for (std::uint32_t i = 0; i < node.low; ++i) emit(body);
  const auto split_to = [&](std::uint32_t split, std::uint32_t inside, std::uint32_t outside) {
    program[split].x = node.lazy ? outside : inside;
    program[split].y = node.lazy ? inside : outside;
  };
  if (node.high == kUnbounded) {
    const std::uint32_t split = put({Instruction::kSplit});
    emit(body);
    put({Instruction::kJump, split});
    split_to(split, split + 1, static_cast<std::uint32_t>(program.size()));
  } else {
    std::vector<std::uint32_t> splits;
    for (std::uint32_t i = node.low; i < node.high; ++i) {
      splits.push_back(put({Instruction::kSplit}));
      emit(body);
    }
    for (const std::uint32_t split : splits) split_to(split, split + 1, static_cast<std::uint32_t>(program.size()));
  }
  if (node.possessive) {
    put({Instruction::kEnd});
    program[atomic].x = static_cast<std::uint32_t>(program.size());
  }
}

}  // namespace edgelm::capi
