// The thread that moves pages between a device and a file: its jobs.
#include "pager/io_thread.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <filesystem>
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
  all_is_done_at_the_end();
  return failures();
}
