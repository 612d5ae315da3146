#include "io_thread.h"

#include <chrono>
#include <condition_variable>
#include <deque>
#include <exception>
#include <mutex>
#include <thread>

namespace qlora::pager {

struct IoThread::Shared {
  std::mutex mutex;
  std::condition_variable given, finished;
  std::deque<std::function<void()>> jobs;
  std::uint64_t submitted = 0, done = 0;
  bool ending = false;
  std::exception_ptr error;
  std::thread thread;
};

IoThread::IoThread() : shared_(new Shared) {}

IoThread::~IoThread() {
  if (!in_own_process()) return;
  if (shared_->thread.joinable()) {
    {
      const std::lock_guard lock(shared_->mutex);
      shared_->ending = true;
    }
    shared_->given.notify_all();
    shared_->thread.join();
  }
  delete shared_;
}

std::uint64_t IoThread::submit(std::function<void()> job) {
  if (!in_own_process()) refuse_fork();
  const std::lock_guard lock(shared_->mutex);
  // First, for if there can be no thread there is no job either.
  if (!shared_->thread.joinable()) shared_->thread = std::thread([shared = shared_] { run(*shared); });
  shared_->jobs.push_back(std::move(job));
  shared_->given.notify_all();
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

void IoThread::check() const {
  if (!in_own_process()) return;
  const std::lock_guard lock(shared_->mutex);
  if (shared_->error) std::rethrow_exception(shared_->error);
}

void IoThread::run(Shared& shared) {
  std::unique_lock lock(shared.mutex);
  while (true) {
    shared.given.wait(lock, [&] { return shared.ending || !shared.jobs.empty(); });
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
