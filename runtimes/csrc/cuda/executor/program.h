// A bundle's graph as a list of EdgeLM's operators (program.json), and its checks. As runtimes/cuda/program.py; who reads
// the file fills in the structs.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "cuda/host/matrix.h"

namespace edgelm::gpu {

struct Attribute {
  enum Type { kInteger, kNumber, kText };
  Type type;
  std::string text;  // a number in decimal digits, as Python prints it
};
using Attributes = std::map<std::string, Attribute>;

// An operator of the graph. `name` is used in error messages; an input "" is absent.
struct ProgramNode {
  std::string op, name;
  std::vector<std::string> inputs, outputs;
  Attributes attributes;

  const std::string& input(std::size_t index) const;  // "" if it is absent
  // Attributes; throw Error (kBundle) if one is missing or of another type. Integers are from 0 to 2^31 - 1, sizes from 1.
  const std::string& text(const std::string& key) const;
  i64 integer(const std::string& key) const;
  // The attributes as launch planning reads them.
  Fields fields() const;
};

// An intermediate result [batch, tokens, width].
struct ProgramValue {
  std::string type;  // f32, bf16 or f16
  i64 width;

  u64 row_bytes() const;
};

// A tensor in the weights file.
struct ProgramWeight {
  std::string type;
  std::vector<i64> dims;
  u64 offset, size;
};

struct Program {
  std::vector<ProgramNode> nodes;
  std::map<std::string, ProgramValue> values;
  std::map<std::string, ProgramWeight> weights;
  Attributes exact;  // attribute values of the debug program

  // Throw Error (kBundle) if it is damaged: if it reads a value that no node computes, or shapes contradict each other.
  void check() const;
  // The same nodes with exact matmuls; all values are float32.
  Program debug() const;
  // Size of the weights file up to the last byte that is used.
  u64 weight_bytes() const;
};

// Bytes of an element; 0: no such type.
u64 type_bytes(const std::string& type);

// Values with one row for each position whose logits are computed; all others have one for each new token.
bool after_head(const std::string& name);

constexpr char kCachePrefix[] = "past_key_values.";  // inputs that a node updates in place
constexpr char kPresentPrefix[] = "present.";        // outputs that are the same memory
bool starts_with(const std::string& text, const char* prefix);

}  // namespace edgelm::gpu
