#include "io_thread.h"

#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <thread>

namespace qlora::pager {

namespace {

// Not yield(): where all cores are busy, that gives a whole time slice away.
void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// A condition that is waited for awake at first: while a walk is under way, it comes sooner than a sleeping thread
// would wake. Whoever changes what it depends on has the mutex, as with std::condition_variable.
class Condition {
 public:
  void notify() {
    changes_.fetch_add(1, std::memory_order_relaxed);
    changed_.notify_all();
  }

  template <typename Holds>
  void wait(std::unique_lock<std::mutex>& lock, const Holds& holds) {
    constexpr std::chrono::microseconds kAwake(100);
    const auto asleep = std::chrono::steady_clock::now() + kAwake;
    for (bool awake = true; awake && !holds();) {
      const std::uint64_t seen = changes_.load(std::memory_order_relaxed);
      lock.unlock();
      while (awake && changes_.load(std::memory_order_relaxed) == seen) {
        pause();
        awake = std::chrono::steady_clock::now() < asleep;
      }
      lock.lock();
    }
    changed_.wait(lock, holds);
  }

 private:
  std::condition_variable changed_;
  std::atomic<std::uint64_t> changes_ = 0;
};

}  // namespace

void refuse_fork() {
  throw std::runtime_error("PagedAdamW: expected the process that made the optimizer, got a fork of it");
}

struct IoThread::Shared {
  std::mutex mutex;
  Condition given, finished;
  std::deque<std::function<void()>> jobs;
  std::uint64_t submitted = 0, done = 0;
  const std::function<bool()>* part = nullptr;  // of work to help with
  bool helping = false;                         // the thread is in *part
  std::atomic<bool> enough = false;             // it is to leave *part after this call
  bool ending = false;
  std::exception_ptr error;
  std::thread thread;
};

IoThread::IoThread() : shared_(new Shared), process_(::getpid()) {}

IoThread::~IoThread() {
  if (!in_own_process()) return;
  if (shared_->thread.joinable()) {
    {
      const std::lock_guard lock(shared_->mutex);
      shared_->ending = true;
    }
    shared_->given.notify();
    shared_->thread.join();
  }
  delete shared_;
}

bool IoThread::in_own_process() const { return ::getpid() == process_; }

std::uint64_t IoThread::submit(std::function<void()> job) {
  if (!in_own_process()) refuse_fork();
  const std::lock_guard lock(shared_->mutex);
  // First, for if there can be no thread there is no job either.
  if (!shared_->thread.joinable()) shared_->thread = std::thread([shared = shared_] { run(*shared); });
  shared_->jobs.push_back(std::move(job));
  shared_->enough = true;
  shared_->given.notify();
  return ++shared_->submitted;
}

void IoThread::wait(std::uint64_t number) {
  if (number == 0) return;
  if (!in_own_process()) refuse_fork();
  std::unique_lock lock(shared_->mutex);
  if (shared_->done < number) {
    const auto start = std::chrono::steady_clock::now();
    shared_->finished.wait(lock, [&] { return shared_->done >= number; });
    seconds_waited_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }
  if (shared_->error) std::rethrow_exception(shared_->error);
}

void IoThread::help(const std::function<bool()>& part, const std::function<void()>& work) {
  struct Help {
    Shared& shared;
    ~Help() {
      std::unique_lock lock(shared.mutex);
      shared.part = nullptr;
      shared.enough = true;
      shared.finished.wait(lock, [&] { return !shared.helping; });
    }
  };
  {
    const std::lock_guard lock(shared_->mutex);
    shared_->part = &part;
  }
  const Help help{*shared_};
  shared_->given.notify();
  work();
}

void IoThread::check() const {
  if (!in_own_process()) return;
  const std::lock_guard lock(shared_->mutex);
  if (shared_->error) std::rethrow_exception(shared_->error);
}

void IoThread::run(Shared& shared) {
  std::unique_lock lock(shared.mutex);
  while (true) {
    shared.given.wait(lock, [&] { return shared.ending || !shared.jobs.empty() || shared.part != nullptr; });
    if (shared.jobs.empty() && shared.part != nullptr) {
      const std::function<bool()>& part = *shared.part;
      shared.helping = true;
      shared.enough = false;
      lock.unlock();
      bool more = true;
      while (more && !shared.enough) more = part();
      lock.lock();
      shared.helping = false;
      if (!more) shared.part = nullptr;
      shared.finished.notify();
      continue;
    }
    if (shared.jobs.empty()) return;
    const std::function<void()> job = std::move(shared.jobs.front());
    shared.jobs.pop_front();
    if (!shared.error) {
      lock.unlock();
      std::exception_ptr error;
      try {
        job();
      } catch (...) {
        error = std::current_exception();
      }
      lock.lock();
      shared.error = error;
    }
    ++shared.done;
    shared.finished.notify();
  }
}

}  // namespace qlora::pager
