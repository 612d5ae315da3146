// The thread that moves pages between a device and a file: its jobs.
#include "pager/io_thread.h"

#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <filesystem>
#include <functional>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "../check.h"

using qlora::pager::IoThread;

namespace {

void jobs_in_order() {
  std::vector<int> done;
  IoThread io;
  std::uint64_t last = 0;
  for (int i = 0; i < 100; ++i) last = io.submit([&done, i] { done.push_back(i); });
  io.wait(last);
  CHECK_EQ(done.size(), 100u);
  for (int i = 0; i < 100; ++i) CHECK_EQ(done[static_cast<std::size_t>(i)], i);
}

// What has failed is said again and again, and what was to come after it is not done.
void a_failed_job_is_the_last() {
  IoThread io;
  int done = 0;
  io.wait(io.submit([&] { ++done; }));
  io.submit([] { throw std::runtime_error("of the job"); });
  const std::uint64_t last = io.submit([&] { ++done; });
  for (int i = 0; i < 2; ++i) {
    try {
      io.wait(last);
      CHECK(false);
    } catch (const std::runtime_error& error) {
      CHECK_EQ(std::string(error.what()), "of the job");
    }
  }
  CHECK_EQ(done, 1);
}

int status_of(const std::function<bool()>& in_fork) {
  const pid_t child = fork();
  if (child == 0) {
    alarm(5);
    _exit(in_fork() ? 0 : 1);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return status;
}

// A fork has no such thread: to wait for it, or to give it work, is refused. What has failed is the parent's to hear.
void a_fork_is_refused() {
  IoThread io;
  std::atomic<bool> go = false;
  const std::uint64_t first = io.submit([&] {
    while (!go) std::this_thread::yield();
  });
  CHECK_EQ(status_of([&] {
             return contains(error_of([&] { io.wait(first); }), "fork") &&
                    contains(error_of([&] { io.submit([] {}); }), "fork");
           }),
           0);
  go = true;
  io.wait(first);
  const std::uint64_t bad = io.submit([] { throw std::runtime_error("of the job"); });
  CHECK_EQ(error_of([&] { io.wait(bad); }), "of the job");
  CHECK_EQ(error_of([&] { io.check(); }), "of the job");
  CHECK_EQ(status_of([&] { return error_of([&] { io.check(); }).empty(); }), 0);
}

void starts_with_the_first_job() {
  const auto threads = [] {
    return std::distance(std::filesystem::directory_iterator("/proc/self/task"), std::filesystem::directory_iterator());
  };
  std::thread([] {}).join();  // a sanitizer may start its own with the first
  auto before = threads();
  for (int i = 0; i < 100; ++i) {  // a thread that is joined is counted until the kernel has done with it
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
    before = std::min(before, threads());
  }
  IoThread io;
  CHECK_EQ(threads(), before);
  io.wait(io.submit([] {}));
  CHECK_EQ(threads(), before + 1);
}

void all_is_done_at_the_end() {
  std::atomic<int> done = 0;
  {
    IoThread io;
    for (int i = 0; i < 100; ++i) io.submit([&] { ++done; });
  }
  CHECK_EQ(done.load(), 100);
}

}  // namespace

int main() {
  starts_with_the_first_job();
  jobs_in_order();
  a_failed_job_is_the_last();
  a_fork_is_refused();
  all_is_done_at_the_end();
  return failures();
}
