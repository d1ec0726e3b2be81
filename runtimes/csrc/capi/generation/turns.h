// Queue of the calls that use a model: one runs at a time, in the order of arrival. As edgelm/generation/turns.py.
#pragma once

#include <condition_variable>
#include <functional>
#include <list>
#include <mutex>
#include <thread>

namespace edgelm::capi {

class Turns {
 public:
  // `begin` is called when a call has its turn, `cancel` by another thread while that call runs.
  Turns(std::function<void()> begin, std::function<void()> cancel)
      : begin_(std::move(begin)), cancel_(std::move(cancel)) {}

  // End the call that runs; does nothing if there is none.
  void cancel();
  // End the call that runs, fail those that wait, and wait until all have ended. In a callback of the call that runs it
  // does not wait.
  void close();

 private:
  friend class Turn;
  struct Place {
    std::thread::id thread;
    bool cancelled;
  };

  std::function<void()> begin_, cancel_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::list<Place> queue_;  // the first one runs
  bool closed_ = false;
};

// A call's place in the queue. The constructor returns when it is this call's turn; the destructor ends it.
class Turn {
 public:
  // Throws Error(EDGELM_CANCELLED) if the model is closed, EDGELM_INVALID_ARGUMENT in a callback of this model, where it
  // would wait for itself.
  explicit Turn(Turns& turns);
  ~Turn();
  Turn(const Turn&) = delete;
  Turn& operator=(const Turn&) = delete;

  bool cancelled() const;
  // Throws Error(EDGELM_CANCELLED) if the call was cancelled.
  void check() const;

 private:
  void leave();

  Turns& turns_;
  Turns::Place* place_;
};

}  // namespace edgelm::capi
