// The work of a block of threads in linear_skinny, and the stream of weights to its warps.
#pragma once

#include "linear/linear_output.cuh"

namespace edgelm {

// A position of a block of threads in its work.
struct SkinnyPlace {
  int active;  // index of the expert among those with rows
  int tile;    // of x_tile of its rows
  int strip;   // of at_a_time blocks of 16 rows of the matrix
  int chunk;   // of columns
};

// List the experts that have rows, in order, as count, then {expert, first slot, rows} of each; one warp does it.
EDGELM_DEVICE void list_experts(const i32* offsets, int experts, int* list) {
  const int lane = thread() % kWarp;
  int count = 0;
  for (int base = 0; base < experts; base += kWarp) {
    const int expert = base + lane;
    const int first = offsets[min_(expert, experts)], end = offsets[min_(expert + 1, experts)];
    const u32 found = ballot(end > first);
    if (end > first) {
      int* entry = list + 1 + 3 * (count + count_bits(found & ((1u << lane) - 1)));
      entry[0] = expert;
      entry[1] = first;
      entry[2] = end - first;
    }
    count += count_bits(found);
  }
  if (lane == 0) list[0] = count;
}

// The items of a block of threads, one after the other, and of each what a warp reads. Without EXPERTS the kernel is
// for one matrix and at most x_tile rows.
template <bool EXPERTS> struct SkinnyWork {
  const LinearArgs& args;
  const SkinnyPlan& plan;
  const int* const experts;  // as list_experts writes it
  const int warp, part, own_block;
  const u32 lane;
  int first_active = 0, first_strip = 0, last_active = 0, last_strip = 0;

  EDGELM_INLINE explicit SkinnyWork(const SkinnyArgs& a)
      : args(a.linear),
        plan(a.plan),
        experts(reinterpret_cast<const int*>(shared_memory() + a.plan.experts_at)),
        warp(shuffle(int(u32(thread()) / kWarp),
                     0)),  // from a shuffle the compiler knows that it is the same in all lanes
        part(warp & ((1 << a.plan.split_shift) - 1)),
        own_block(warp >> a.plan.split_shift),
        lane(u32(own_lane())) {}

  EDGELM_INLINE bool has_experts() const { return EXPERTS && args.experts; }
  EDGELM_INLINE int expert(int active) const { return has_experts() ? experts[1 + 3 * active] : 0; }
  EDGELM_INLINE int first_slot(int active) const { return has_experts() ? experts[2 + 3 * active] : 0; }
  EDGELM_INLINE int rows(int active) const { return has_experts() ? experts[3 + 3 * active] : args.rows; }

  static EDGELM_INLINE int divided(int x, u32 factor) { return int(u64(u32(x)) * factor >> 31); }

  // Find the items. False: there are none.
  EDGELM_INLINE bool begin() {
    int each = plan.items_each, left = plan.items_left;
    if (has_experts()) {
      const int items = experts[0] * plan.strips;
      each = divided(items, plan.grid_factor);
      left = items - each * grid_x();
    }
    first_strip = block_x() * each + min_(block_x(), left);
    last_strip = first_strip + each - (block_x() < left ? 0 : 1);
    const bool any = !EXPERTS || first_strip <= last_strip;  // a launch for one matrix has no more blocks than items
    if (has_experts()) {
      first_active = divided(first_strip, plan.strips_factor);
      last_active = divided(last_strip, plan.strips_factor);
      first_strip -= first_active * plan.strips;
      last_strip -= last_active * plan.strips;
    }
    return any;
  }
  EDGELM_INLINE SkinnyPlace start() const { return {first_active, 0, first_strip, 0}; }
  EDGELM_INLINE bool is_end(const SkinnyPlace& p) const {
    return EXPERTS ? p.active > last_active : p.strip > last_strip;
  }

  // Whether the next place has other rows of x.
  EDGELM_INLINE bool next(SkinnyPlace& p) const {
    if (++p.chunk < plan.chunks) return false;
    p.chunk = 0;
    if (++p.strip <= (!EXPERTS || p.active == last_active ? last_strip : plan.strips - 1)) return false;
    if constexpr (!EXPERTS) return false;
    p.strip = p.active == first_active ? first_strip : 0;
    if (++p.tile * plan.x_tile < rows(p.active)) return true;
    p.tile = 0;
    p.strip = 0;
    ++p.active;
    return true;
  }

  EDGELM_INLINE int share(const SkinnyPlace& p) const {
    return p.chunk == plan.chunks - 1 ? plan.last_share : plan.share;
  }
  // The tiles of this warp at a place.
  EDGELM_INLINE void tiles(const SkinnyPlace& p, int& first, int& end) const {
    first = p.chunk * plan.chunk + part * share(p);
    end = min_(first + share(p), min_(plan.tiles, (p.chunk + 1) * plan.chunk));
    if (p.strip * plan.at_a_time + own_block >= plan.blocks) end = first;
  }
  EDGELM_INLINE int tokens(const SkinnyPlace& p) const {
    return EXPERTS ? min_(plan.x_tile, rows(p.active) - p.tile * plan.x_tile) : args.rows;
  }
  EDGELM_INLINE int first_token(const SkinnyPlace& p) const {
    return EXPERTS ? first_slot(p.active) + p.tile * plan.x_tile : 0;
  }
};

// Streams a warp's tiles through a ring of slots in shared memory. All slots are in flight, also from one item to the
// next. No barrier of the block is needed, as every warp copies what it reads. That leaves a thread 64 registers or
// less, so that a multiprocessor has room for two blocks of 16 warps: of one launch, or of the next one if it starts
// early.
//
// GROUP: columns to a scale, if the kernel is for one group; 0: any, from the arguments.
template <class W, int GROUP, bool EXPERTS> struct SkinnyStream {
  static constexpr SkinnySlot kSlot = skinny_slot(Format<W>::columns, Format<W>::scale_bytes, Is<W>::integer, GROUP);
  static constexpr int kCodes = 2 * kTileBytes;                  // bytes of a slot's codes
  static constexpr u32 kLanes = Format<W>::scale_bytes;          // that copy the scales of a group, 16 bytes each
  static constexpr u32 kScaleLanes = 2 * kSlot.groups * kLanes;  // that copy those of a slot

  const SkinnyWork<EXPERTS>& work;
  SkinnyPlace place;          // of the tiles to come
  int tile = 0, end = 0;      // those of the place
  const u8* codes = nullptr;  // this lane's bytes of the 16 rows
  Shared slot;                // this lane's bytes of the oldest slot
  const Shared ring_end;
  // Each of the first lanes copies 16 bytes of a group of a slot: of its scales or its zero points.
  const u8* group_bytes = nullptr;
  bool is_zeros = false;
  u32 entry = 0;       // which of the slot's groups
  int needs = 0;       // tiles that a slot must have for this group; more than any has: this lane copies none
  u32 group_step = 0;  // bytes from a group to the next

  EDGELM_INLINE explicit SkinnyStream(const SkinnyWork<EXPERTS>& w)
      : work(w),
        place(w.start()),
        slot(shared_address(shared_memory()) + w.warp * w.plan.ring + w.lane * 16),
        ring_end(slot + w.plan.ring) {
    enter();
    copy_codes(slot);  // as early as can be
    if constexpr (Is<W>::scaled) {
      is_zeros = w.lane >= kScaleLanes;
      entry = is_zeros ? w.lane - kScaleLanes : w.lane / kLanes;
      const bool zeros = Is<W>::integer && w.args.zeros;
      needs = w.lane < (zeros ? kScaleLanes + 2 * kSlot.groups : kScaleLanes) ? int(entry / kSlot.groups) + 1 : 1 << 24;
      group_step = is_zeros ? kTileRows : kTileRows * Format<W>::scale_bytes;
      enter_groups();
    }
    complete(slot);
    for (int i = 1; i < work.plan.ahead; ++i) fetch(slot + i * kSlot.bytes);
  }

  // Find the next place where this warp has tiles, from `place` on.
  EDGELM_INLINE void enter() {
    for (; !work.is_end(place); work.next(place)) {
      work.tiles(place, tile, end);
      if (tile >= end) continue;
      codes = work.args.codes + u64(block()) * u32(work.plan.block_bytes) + work.lane * 16;
      if (work.has_experts()) codes += work.expert(place.active) * work.args.codes_stride;
      return;
    }
    tile = end = 0;
  }
  EDGELM_INLINE void enter_groups() {
    if (tile >= end) return;
    const LinearArgs& args = work.args;
    group_bytes = (is_zeros ? args.zeros : args.scales) + u64(block() * work.plan.groups) * group_step +
                  (is_zeros ? 0u : work.lane % kLanes * 16u);
    if constexpr (kStraight) group_bytes += entry * group_step;
    if (work.has_experts()) {
      group_bytes += work.expert(place.active) * (is_zeros ? args.zeros_stride : args.scales_stride);
    }
  }
  EDGELM_INLINE u32 block() const { return place.strip * work.plan.at_a_time + work.own_block; }

  // Start copying the next tiles, if there are any: first their codes, then the rest.
  EDGELM_INLINE void fetch(Shared to) {
    copy_codes(to);
    complete(to);
  }
  EDGELM_INLINE void copy_codes(Shared to) const {
    if (tile >= end) return;
    const u8* from = codes + u64(u32(tile)) * kTileBytes;
    cp_async16(to, from);
    if (tile + 1 < end) cp_async16(to + kTileBytes, from + kTileBytes);
  }
  EDGELM_INLINE void complete(Shared to) {
    if (tile < end) {
      if constexpr (Is<W>::scaled) {
        const u32 group = group_of(tile);
        if (tile + needs <= end && (GROUP > 0 || group < u32(work.plan.groups))) {
          cp_async16(to + kCodes, group_bytes + u64(group) * group_step);
        }
      }
      tile += 2;
      if (tile >= end) {
        work.next(place);
        enter();
        if constexpr (Is<W>::scaled) enter_groups();
      }
    }
    cp_async_commit();
  }
  // Whether a slot's groups follow each other in memory.
  static constexpr bool kStraight = GROUP > 0 && GROUP <= Format<W>::columns;
  // The group that this lane copies for a slot that begins with tile `first`; kStraight: that of lane 0.
  EDGELM_INLINE u32 group_of(u32 first) const {
    const u32 own = first + entry / kSlot.groups;
    if constexpr (kStraight) return first * kSlot.groups;
    else if constexpr (GROUP > 0) return own / (GROUP / Format<W>::columns);
    else return group_of_step(own * Format<W>::steps) + entry % kSlot.groups;
  }
  EDGELM_INLINE u32 group_of_step(u32 step) const { return work.divided(step, work.plan.group_factor); }

  // Wait for the oldest slot, and return this lane's bytes of it.
  EDGELM_INLINE Shared take() const {
    if (work.plan.ahead == 4) cp_async_wait<3>();
    else if (work.plan.ahead == 2) cp_async_wait<1>();
    else cp_async_wait<0>();
    if constexpr (Is<W>::scaled) sync_warp();  // a lane reads scales that others copied
    return slot;
  }
  // Fill the oldest slot again. All lanes have read it, as an mma of the warp followed.
  EDGELM_INLINE void replace() {
    fetch(slot);
    slot += kSlot.bytes;
    if (slot == ring_end) slot -= work.plan.ring;
  }
};

}  // namespace edgelm
