#include "capi/generation/turns.h"

#include <algorithm>

#include "capi/common/error.h"

namespace edgelm::capi {

void Turns::cancel() {
  const std::lock_guard lock(mutex_);
  if (queue_.empty()) return;
  queue_.front().cancelled = true;
  cancel_();
}

void Turns::close() {
  std::unique_lock lock(mutex_);
  closed_ = true;
  if (!queue_.empty()) {
    queue_.front().cancelled = true;
    cancel_();
  }
  changed_.notify_all();
  if (!queue_.empty() && queue_.front().thread == std::this_thread::get_id()) return;
  changed_.wait(lock, [this] { return queue_.empty(); });
}

Turn::Turn(Turns& turns) : turns_(turns) {
  std::unique_lock lock(turns.mutex_);
  const std::thread::id self = std::this_thread::get_id();
  if (!turns.queue_.empty() && turns.queue_.front().thread == self)
    fail(EDGELM_INVALID_ARGUMENT,
         "a callback of this model cannot compute with it: return from the callback, then make the call");
  if (turns.closed_) fail(EDGELM_CANCELLED, "this model was closed: open the bundle again");
  place_ = &turns.queue_.emplace_back(Turns::Place{self, false});
  turns.changed_.wait(lock, [&] { return turns.closed_ || &turns.queue_.front() == place_; });
  if (turns.closed_) {
    leave();
    fail(EDGELM_CANCELLED, "this model was closed while the call waited for its turn");
  }
  turns.begin_();
}

Turn::~Turn() {
  const std::lock_guard lock(turns_.mutex_);
  leave();
}

void Turn::leave() {
  // A call that fails while it waits may stand in the middle: a list keeps the other places where they are.
  auto& queue = turns_.queue_;
  queue.erase(std::find_if(queue.begin(), queue.end(), [this](const Turns::Place& place) { return &place == place_; }));
  turns_.changed_.notify_all();
}

bool Turn::cancelled() const {
  const std::lock_guard lock(turns_.mutex_);
  return place_->cancelled;
}

void Turn::check() const {
  if (cancelled()) fail(EDGELM_CANCELLED, "the call was cancelled");
}

}  // namespace edgelm::capi
