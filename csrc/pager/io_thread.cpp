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

struct IoThread::Shared {
  std::mutex mutex;
  std::condition_variable given, finished;
  std::deque<std::function<void()>> jobs;
  std::uint64_t submitted = 0, done = 0;
  const std::function<bool()>* part = nullptr;  // of work to help with
  bool helping = false;                         // the thread is in *part
  std::atomic<bool> enough = false;             // it is to come back from there
  bool ending = false;
  std::exception_ptr error;
  std::thread thread;
};

namespace {

// While a walk is under way, what is waited for comes sooner than a sleeping thread would be awake.
constexpr int kYields = 100;

template <typename Ready>
void wait_until(const Ready& ready, std::condition_variable& changed, std::unique_lock<std::mutex>& lock) {
  for (int i = 0; i < kYields && !ready(); ++i) {
    lock.unlock();
    std::this_thread::yield();
    lock.lock();
  }
  changed.wait(lock, ready);
}

}  // namespace

IoThread::IoThread() : shared_(new Shared), process_(::getpid()) {}

IoThread::~IoThread() {
  if (!in_own_process()) return;
  if (shared_->thread.joinable()) {
    {
      const std::lock_guard lock(shared_->mutex);
      shared_->ending = true;
    }
    shared_->given.notify_one();
    shared_->thread.join();
  }
  delete shared_;
}

bool IoThread::in_own_process() const { return ::getpid() == process_; }

std::uint64_t IoThread::submit(std::function<void()> job) {
  if (!in_own_process()) throw std::runtime_error("pager: a forked process cannot use its parent's I/O thread");
  const std::lock_guard lock(shared_->mutex);
  shared_->jobs.push_back(std::move(job));
  shared_->enough = true;
  if (!shared_->thread.joinable()) shared_->thread = std::thread([shared = shared_] { run(*shared); });
  shared_->given.notify_one();
  return ++shared_->submitted;
}

void IoThread::wait(std::uint64_t number) {
  if (number == 0) return;
  if (!in_own_process()) throw std::runtime_error("pager: a forked process cannot use its parent's I/O thread");
  std::unique_lock lock(shared_->mutex);
  if (shared_->done < number) {
    const auto start = std::chrono::steady_clock::now();
    wait_until([&] { return shared_->done >= number; }, shared_->finished, lock);
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
      wait_until([&] { return !shared.helping; }, shared.finished, lock);
    }
  };
  {
    const std::lock_guard lock(shared_->mutex);
    shared_->part = &part;
  }
  const Help help{*shared_};
  shared_->given.notify_one();
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
    wait_until([&] { return shared.ending || !shared.jobs.empty() || shared.part != nullptr; }, shared.given, lock);
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
      shared.finished.notify_all();
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
    shared.finished.notify_all();
  }
}

}  // namespace qlora::pager
