#include "capi/generation/session.h"

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <memory>

#include "capi/common/files.h"
#include "capi/common/json.h"
#include "capi/runtime/checks.h"

namespace edgelm::capi {
namespace {

using Ids = PrefixCache::Ids;

constexpr char kMagic[8] = {'E', 'D', 'G', 'E', 'L', 'M', 'K', 'V'};
constexpr std::uint32_t kVersion = 1, kMostHeader = 4096;
constexpr std::size_t kBlock = 1 << 20;

static_assert(sizeof(float) == 4 && sizeof(std::int32_t) == 4);
#if defined(__BYTE_ORDER__)
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "session files are little-endian");
#endif

struct Header {
  std::string manifest, runtime, kv;
  std::int64_t vocab_size, tokens, prompt_tokens, fresh_tokens, chunk, cache_bytes;
  bool fresh;

  std::string dump() const {
    return Json(Json::Object{{"manifest", manifest},
                             {"runtime", runtime},
                             {"kv", kv},
                             {"vocab_size", vocab_size},
                             {"tokens", tokens},
                             {"prompt_tokens", prompt_tokens},
                             {"fresh", fresh},
                             {"fresh_tokens", fresh_tokens},
                             {"chunk", chunk},
                             {"cache_bytes", cache_bytes}})
        .dump();
  }
};

Header read_header(const std::string& text, const std::string& where) {
  const Json json = Json::parse(text, where, EDGELM_FILE);
  const Members members(json, where, EDGELM_FILE);
  Header header;
  header.manifest = members.string("manifest");
  header.runtime = members.string("runtime");
  header.kv = members.string("kv");
  header.vocab_size = members.integer("vocab_size", 1, INT32_MAX);
  header.tokens = members.integer("tokens", 0, INT32_MAX);
  header.prompt_tokens = members.integer("prompt_tokens", 0, header.tokens);
  header.fresh = members.boolean("fresh");
  header.fresh_tokens = members.integer("fresh_tokens", 0, header.tokens);
  header.chunk = members.integer("chunk", 1, INT32_MAX);
  header.cache_bytes = members.integer("cache_bytes", 0);
  return header;
}

// A session file that is read twice: first to check it, then into the model.
class Reader {
 public:
  Reader(const std::string& path, std::function<void()> check)
      : path_(path), check_(std::move(check)), file_(system::open_stream(path)) {
    if (!file_) fail(EDGELM_FILE, path, " cannot be read: ", std::strerror(errno));
  }

  [[noreturn]] void refuse(const std::string& why) const { fail(EDGELM_FILE, path_, ": ", why); }
  const std::string& path() const { return path_; }

  // Read exactly `size` bytes. `into` null: only count them in the CRC.
  void read(void* into, std::uint64_t size) {
    auto* bytes = static_cast<unsigned char*>(into);
    std::vector<unsigned char> scratch(into == nullptr ? std::size_t(std::min<std::uint64_t>(size, kBlock)) : 0);
    while (size > 0) {
      check_();
      const auto part = std::size_t(std::min<std::uint64_t>(size, kBlock));
      unsigned char* place = bytes == nullptr ? scratch.data() : bytes;
      if (std::fread(place, 1, part, file_.get()) != part) truncated();
      crc_ = crc32(place, part, crc_);
      if (bytes != nullptr) bytes += part;
      size -= part;
    }
  }

  // Whether the file ends with the CRC of what was read.
  bool ends() {
    const std::uint32_t computed = crc_;
    std::uint32_t stored = 0;
    if (std::fread(&stored, 1, sizeof stored, file_.get()) != sizeof stored) truncated();
    return stored == computed && std::fgetc(file_.get()) == EOF && !std::ferror(file_.get());
  }

  void rewind() {
    if (std::fseek(file_.get(), 0, SEEK_SET) != 0) refuse(std::strerror(errno));
    crc_ = 0;
  }

 private:
  [[noreturn]] void truncated() const {
    if (std::ferror(file_.get())) fail(EDGELM_FILE, path_, " cannot be read: ", std::strerror(errno));
    refuse("this session file is cut off: save the session again");
  }

  std::string path_;
  std::function<void()> check_;
  system::Stream file_;
  std::uint32_t crc_ = 0;
};

// The parts before the cache.
struct Front {
  Header header;
  Ids tokens;
  std::vector<float> logits;
};

Header checked_header(Reader& file, const SessionOf& session) {
  char magic[sizeof kMagic];
  std::uint32_t numbers[2];
  file.read(magic, sizeof magic);
  if (std::memcmp(magic, kMagic, sizeof magic) != 0) file.refuse("this is not a session that EdgeLM saved");
  file.read(numbers, sizeof numbers);
  if (numbers[0] != kVersion)
    file.refuse(
        concat("session format ", numbers[0], ", and this EdgeLM reads ", kVersion, ": save the session again"));
  if (numbers[1] > kMostHeader) file.refuse("the session's header is damaged: save the session again");
  std::string text(numbers[1], '\0');
  file.read(text.data(), text.size());
  Header header = read_header(text, file.path());
  const Runtime& runtime = session.runtime;
  if (header.manifest != session.manifest_sha256)
    file.refuse("this session belongs to another bundle: open that one, or save the session again");
  if (header.runtime != runtime.name)
    file.refuse(concat("this session was saved with the runtime ", quoted(header.runtime), ", not ", runtime.name));
  if (header.kv != runtime.kv)
    file.refuse(concat("this session has a KV cache of type ", quoted(header.kv), ", and the model has ", runtime.kv,
                       ": open the bundle with that type"));
  check_room(std::size_t(header.tokens), 0, runtime.context_length, runtime.model_context_length);
  if (header.vocab_size != runtime.vocab_size ||
      std::uint64_t(header.cache_bytes) != runtime.cache_bytes(header.tokens))
    file.refuse("the session's sizes are not those of the model: save the session again");
  return header;
}

Front read_front(Reader& file, const SessionOf& session) {
  Front front{checked_header(file, session), {}, {}};
  front.tokens.resize(std::size_t(front.header.tokens));
  file.read(front.tokens.data(), front.tokens.size() * sizeof(std::int32_t));
  front.logits.resize(front.header.prompt_tokens > 0 ? std::size_t(front.header.vocab_size) : 0);
  file.read(front.logits.data(), front.logits.size() * sizeof(float));
  return front;
}

}  // namespace

void save_session(const SessionOf& session, const std::string& path) {
  Runtime& runtime = session.runtime;
  const Ids tokens = session.cache.cached();
  PrefixCache::Prefilled prompt = session.cache.last_prompt();
  if (prompt.tokens.size() > tokens.size()) prompt = {};
  const auto count = std::int64_t(tokens.size());
  const Header header{session.manifest_sha256,
                      runtime.name,
                      runtime.kv,
                      runtime.vocab_size,
                      count,
                      std::int64_t(prompt.tokens.size()),
                      std::min(session.cache.fresh_tokens(), count),
                      runtime.chunk,
                      std::int64_t(runtime.cache_bytes(count)),
                      prompt.fresh};
  const std::string text = header.dump();
  const std::uint32_t numbers[2] = {kVersion, std::uint32_t(text.size())};
  write_atomically(path, [&](const std::function<void(const void*, std::size_t)>& write) {
    std::uint32_t crc = 0;
    const auto add = [&](const void* data, std::size_t size) {
      const auto* bytes = static_cast<const unsigned char*>(data);
      for (std::size_t begin = 0; begin < size; begin += kBlock) {
        session.check();
        const std::size_t part = std::min(kBlock, size - begin);
        crc = crc32(bytes + begin, part, crc);
        write(bytes + begin, part);
      }
    };
    add(kMagic, sizeof kMagic);
    add(numbers, sizeof numbers);
    add(text.data(), text.size());
    add(tokens.data(), tokens.size() * sizeof(std::int32_t));
    add(prompt.logits.data(), prompt.logits.size() * sizeof(float));
    runtime.write_cache(count, add);
    write(&crc, sizeof crc);
  });
}

void load_session(const SessionOf& session, const std::string& path) {
  Reader file(path, session.check);
  {
    const Front front = read_front(file, session);
    file.read(nullptr, std::uint64_t(front.header.cache_bytes));
    if (!file.ends()) file.refuse("this session file is damaged: save the session again");
    if (!front.tokens.empty()) check_tokens(front.tokens.data(), front.tokens.size(), session.runtime.vocab_size);
  }
  file.rewind();
  Front front = read_front(file, session);
  // From here on the model changes. A file that another program writes in place meanwhile is noticed at its end.
  session.cache.replace({}, {}, 0);
  session.runtime.truncate(0);
  try {
    session.runtime.read_cache(front.header.tokens, [&](void* into, std::size_t size) { file.read(into, size); });
    if (!file.ends()) file.refuse("this session file changed while it was read: save the session again");
  } catch (...) {
    session.runtime.truncate(0);
    throw;
  }
  const auto end = front.tokens.begin() + std::ptrdiff_t(front.header.prompt_tokens);
  // A prompt that took one step does so here too; a longer one only with the same chunk.
  const Header& header = front.header;
  const bool same = header.chunk == session.runtime.chunk;
  const bool one_step = header.prompt_tokens <= std::min(header.chunk, session.runtime.chunk);
  PrefixCache::Prefilled prompt{Ids(front.tokens.begin(), end), std::move(front.logits),
                                header.fresh && (same || one_step)};
  session.cache.replace(std::move(front.tokens), std::move(prompt), same ? header.fresh_tokens : 0);
}

}  // namespace edgelm::capi
