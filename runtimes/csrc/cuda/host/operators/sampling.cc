// Launches of the sampling kernels, and the memory that they need.
#include "cuda/sampling_args.cuh"

#include <algorithm>

#include "cuda/host/kernels.h"
#include "cuda/host/planners.h"

namespace edgelm::gpu {

namespace {

constexpr i64 kPart = i64(kSamplingThreads) * kSamplingKeys;    // the most tokens of a part
constexpr i64 kSlots = i64(kShortlistThreads) * kSamplingKeys;  // the most slots of a row
constexpr i64 kMostTokens = kSlots / 64 * kPart;                // so that a part has 64 slots
static_assert(kMostTokens <= i64(1) << 20, "sums of more terms would be rounded more than the host allows for");

struct Shape {
  i64 columns, parts, slots, segments;

  explicit Shape(const Fields& fields) : columns(fields.size("columns")) {
    if (columns < 1 || columns > kMostTokens) {
      throw Error("a vocabulary of " + std::to_string(columns) + " tokens, expected 1 to " +
                  std::to_string(kMostTokens));
    }
    // Several parts for a small vocabulary too, for enough slots.
    parts = std::max(divide_up(columns, kPart), std::min<i64>(8, divide_up(columns, kSamplingThreads)));
    slots = std::min<i64>(256, kSlots / parts);
    segments = divide_up(columns, kSegment);
  }

  i64 words() const { return divide_up(columns, 32); }
  i64 part_bytes() const { return round_up(parts * i64(sizeof(SamplingPart))); }
  i64 slot_bytes() const { return round_up(4 * parts * slots); }
  i64 result_bytes() const { return round_up(i64(sizeof(SamplingResult)) + 8 * kShortlist + 8 * segments); }
};

// Bytes of workspace, seen tokens and results of a row, as three i64; then the most tokens that are listed, the tokens
// of a segment, and the number of segments. Nothing if the vocabulary is too large.
std::string sizes(const Fields& fields) {
  if (fields.size("columns") > kMostTokens) return {};
  const Shape shape(fields);
  const i64 found[6] = {shape.part_bytes() + 2 * shape.slot_bytes(),
                        4 * shape.words(),
                        shape.result_bytes(),
                        kShortlist,
                        kSegment,
                        shape.segments};
  return std::string(reinterpret_cast<const char*>(found), sizeof found);
}

std::string launches(const Fields& fields) {
  const Shape shape(fields);
  const i64 rows = fields.size("rows");
  SamplingArgs args = zeroed<SamplingArgs>();
  const u64 workspace = fields.address("workspace");
  point(args.logits, fields.address("logits"));
  point(args.how, fields.address("how"));
  point(args.seen, fields.address("seen"));
  point(args.parts, workspace);
  point(args.keys, workspace + u64(rows * shape.part_bytes()));
  point(args.ids, workspace + u64(rows * (shape.part_bytes() + shape.slot_bytes())));
  point(args.results, fields.address("results"));
  args.stride = shape.result_bytes();
  args.n = i32(shape.columns);
  args.part_count = i32(shape.parts);
  args.slots = i32(shape.slots);
  args.words = i32(shape.words());
  return serialised({
      make_launch("sample_parts_f32", shape.parts, rows, 1, kSamplingThreads, kSamplingShared, args),
      make_launch("sample_rows_f32", 1 + shape.segments, rows, 1, kShortlistThreads, kSamplingShared, args),
  });
}

}  // namespace

const KernelSources& sampling_kernels() {
  static const KernelSources kernels = {
      {"sample_parts_f32", "sampling.cuh", "SamplingArgs", kSamplingThreads, 1, "sample_parts<float>"},
      {"sample_rows_f32", "sampling.cuh", "SamplingArgs", kShortlistThreads, 1, "sample_rows<float>"},
  };
  return kernels;
}

Functions sampling_functions() {
  return {{"sampling_kernels",
           [](const Fields&) {
             KernelNames names;
             for (const KernelSource& one : sampling_kernels()) names.push_back(one.name);
             return lines_of(names);
           }},
          {"sampling_sizes", sizes},
          {"sampling_launches", launches}};
}

}  // namespace edgelm::gpu
