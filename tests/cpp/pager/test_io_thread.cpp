// The thread that moves pages: its jobs, and its help with the caller's work while it has none.
#include "pager/io_thread.h"

#include <atomic>
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

// The caller leaves all to the thread, which does all: each part once, and no part after help() has returned.
void helps_until_nothing_is_left() {
  IoThread io;
  for (int round = 0; round < 50; ++round) {
    std::atomic<int> next = 0, done = 0;
    const std::function<bool()> part = [&] { return next.fetch_add(1) < 20 && ++done; };
    io.help(part, [&] {
      io.submit([] {});  // which starts it
      while (done < 20) std::this_thread::yield();
    });
    CHECK_EQ(done.load(), 20);
    CHECK(next <= 21);
  }
}

// Work that never ends on the thread's side does not keep it from its jobs.
void jobs_come_before_help() {
  IoThread io;
  std::vector<int> done;
  io.help([] { return true; },
          [&] {
            for (int i = 0; i < 20; ++i) io.wait(io.submit([&done, i] { done.push_back(i); }));
          });
  CHECK_EQ(done.size(), 20u);
}

void work_that_throws_is_helped_no_more() {
  IoThread io;
  std::atomic<bool> over = false, late = false;
  const auto part = [&] {
    if (over) late = true;
    return true;
  };
  try {
    io.help(part, [&] {
      io.wait(io.submit([] {}));
      throw std::runtime_error("of the work");
    });
    CHECK(false);
  } catch (const std::runtime_error& error) {
    over = true;
    CHECK_EQ(std::string(error.what()), "of the work");
  }
  io.wait(io.submit([] {}));
  CHECK(!late);
}

}  // namespace

int main() {
  jobs_in_order();
  helps_until_nothing_is_left();
  jobs_come_before_help();
  work_that_throws_is_helped_no_more();
  return failures();
}
