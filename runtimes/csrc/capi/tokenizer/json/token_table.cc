#include "capi/tokenizer/json/token_table.h"

#include <cstring>
#include <random>

namespace edgelm::capi {

namespace {

std::uint64_t random_seed() {
  std::random_device device;
  return std::uint64_t{device()} << 32 | device();
}

std::uint64_t mix(std::uint64_t a, std::uint64_t b) {
  a = (a ^ b) * 0x9e3779b97f4a7c15;
  a = (a ^ a >> 32) * 0xd6e8feb86659fd93;
  return a ^ a >> 29;
}

}  // namespace

TokenTable::TokenTable() : slots_(1024), seed_(random_seed()) {}

std::uint64_t TokenTable::hash(std::string_view text) const {
  std::uint64_t result = seed_ ^ text.size();
  const char* at = text.data();
  std::size_t left = text.size();
  for (; left >= 8; at += 8, left -= 8) {
    std::uint64_t word;
    std::memcpy(&word, at, 8);
    result = mix(result, word);
  }
  std::uint64_t word = 0;
  if (left != 0) std::memcpy(&word, at, left);
  return mix(result, word);
}

std::size_t TokenTable::slot_of(std::string_view token) const {
  const std::size_t mask = slots_.size() - 1;
  std::size_t slot = hash(token) & mask;
  while (slots_[slot] != 0 && text_of(entries_[slots_[slot] - 1]) != token) slot = (slot + 1) & mask;
  return slot;
}

void TokenTable::grow() {
  slots_.assign(slots_.size() * 2, 0);
  for (std::size_t i = 0; i < entries_.size(); ++i) {
    slots_[slot_of(text_of(entries_[i]))] = static_cast<std::uint32_t>(i + 1);
  }
}

void TokenTable::add(std::string_view token, TokenId id) {
  if ((entries_.size() + 1) * 2 > slots_.size()) grow();
  const std::size_t slot = slot_of(token);
  if (slots_[slot] == 0) {
    entries_.push_back({static_cast<std::uint32_t>(text_.size()), static_cast<std::uint32_t>(token.size()), id});
    text_ += token;
    slots_[slot] = static_cast<std::uint32_t>(entries_.size());
  } else {
    Entry& entry = entries_[slots_[slot] - 1];
    if (by_id_[entry.id] == slots_[slot]) by_id_[entry.id] = 0;
    entry.id = id;
  }
  if (static_cast<std::size_t>(id) >= by_id_.size()) by_id_.resize(id + 1);
  by_id_[id] = slots_[slot];
}

TokenId TokenTable::find(std::string_view token) const {
  const std::uint32_t entry = slots_[slot_of(token)];
  return entry == 0 ? kNone : entries_[entry - 1].id;
}

std::optional<std::string_view> TokenTable::token(TokenId id) const {
  if (id < 0 || static_cast<std::size_t>(id) >= by_id_.size() || by_id_[id] == 0) return {};
  return text_of(entries_[by_id_[id] - 1]);
}

MergeTable::MergeTable() : seed_(random_seed()) { reserve(1); }

void MergeTable::reserve(std::size_t count) {
  std::size_t size = 16;
  while (size < count * 2) size *= 2;
  if (size <= slots_.size()) return;
  std::vector<Slot> old(size);
  old.swap(slots_);
  mask_ = size - 1;
  count_ = 0;
  for (const Slot& slot : old) {
    if (slot.key != kFree) {
      add(static_cast<TokenId>(slot.key >> 32), static_cast<TokenId>(slot.key & UINT32_MAX), slot.merge);
    }
  }
}

void MergeTable::add(TokenId left, TokenId right, Merge merge) {
  if ((count_ + 1) * 2 > slots_.size()) reserve(slots_.size());
  const std::uint64_t key = key_of(left, right);
  std::size_t slot = hash(key) & mask_;
  while (slots_[slot].key != kFree && slots_[slot].key != key) slot = (slot + 1) & mask_;
  if (slots_[slot].key == kFree) ++count_;
  slots_[slot] = {key, merge};
}

}  // namespace edgelm::capi
