// GroupQueryAttention on a GPU: QK-norm, clip, rotary embedding, append to the KV cache, causal attention.
//
//   attention_prepare   one block per token: writes queries to the workspace, keys and values to the cache
//   attention_tiles     attention on tensor cores. For at most 16 rows it can also do the work of attention_prepare for
//                       its own rows, so that a layer needs one launch
//   attention_exact     float32, without tensor cores, any number of rows: used by the debug graph
//
// A row is one query head of one token. The H / G query heads that share a KV head are rows of one matmul, so that the
// cache is read once for all of them. Row r of (b, g) is token r / (H / G), head g H / G + r % (H / G).
//
// A cache is bytes [B, G, C, R] with C tokens of R bytes: for each (b, g) first C * S codes; then, if codes have one
// byte (int8, fp8), C float32 scales.
#pragma once

#include "attention/attention_prepare.cuh"

#include "attention/attention_exact.cuh"
#include "attention/attention_tiles.cuh"
