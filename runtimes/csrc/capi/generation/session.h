// Sessions: the cached tokens of a model and their KV cache in a file.
#pragma once

#include <functional>
#include <string>

#include "capi/generation/prefix_cache.h"

namespace edgelm::capi {

// docs/reference/session.md has the format of the files, which edgelm/generation/session_file.py reads and writes too.
struct SessionOf {
  Runtime& runtime;
  PrefixCache& cache;
  std::string manifest_sha256;
  std::function<void()> check;  // called now and then; may throw to stop
};

// Throws Error(EDGELM_FILE), and what `check` throws; an existing file then stays as it was.
void save_session(const SessionOf& session, const std::string& path);

// Throws Error(EDGELM_FILE) for a damaged file or one that belongs to something else, EDGELM_CONTEXT_FULL if its tokens
// do not fit, and what `check` throws. All is checked before the model changes; if the file changes while it is read, the
// model is left without cached tokens.
void load_session(const SessionOf& session, const std::string& path);

}  // namespace edgelm::capi
