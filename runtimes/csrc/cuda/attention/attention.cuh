// GroupQueryAttention: QK-norm, clip, rotary embedding, the append to the cache, causal attention over it.
//
//   attention_prepare   one block a token: queries to the workspace, keys and values to the cache
//   attention_tiles     attention of rows to the cache, on tensor cores. Of few rows (16 at most) it can prepare what
//                       it needs itself: one launch a layer
//   attention_exact     float32, scalar, any number of rows: the debug graph's
//
// A row is one query head of one token: the H / G heads that share a key/value head are rows of one product, so that
// the cache is read once for all of them. Row r of (b, g) is token r / (H / G), head g H / G + r % (H / G).
//
// A cache is bytes [B, G, C, R]. In one (b, g) lie C S codes, then, for codes of one byte, C float32 scales.
#pragma once

#include "attention/attention_prepare.cuh"

#include "attention/attention_exact.cuh"
#include "attention/attention_tiles.cuh"
