// The host backend on real files: random lives, and forks. Faults of the file are in test_page_file.cpp.
#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <csignal>
#include <filesystem>
#include <thread>

#include "host_pager.h"
#include "states_test.h"

using namespace qlora;
using namespace qlora::pager;

namespace {

// Calls `work` in so many threads, and returns when all have.
void in_threads(int count, const std::function<void()>& work) {
  std::vector<std::thread> threads;
  for (int i = 1; i < count; ++i) threads.emplace_back(work);
  work();
  for (std::thread& thread : threads) thread.join();
}

void lives(unsigned seed, std::int64_t room, const std::string& name) {
  const std::string path = room == kUnlimited ? "" : file_name(name);
  {
    AdamwStates states(make_pager(path, room));
    const auto compute = [](const AdamwRun& run) {
      std::atomic<bool> here = true;
      in_threads(kThreads, [&] {
        if (here.exchange(false)) update(run.slices);
        const auto of_page = [](std::span<const AdamwSlice> slices, std::span<const std::size_t>) { update(slices); };
        while (run.absent > 0 && run.pass(of_page)) continue;
      });
    };
    live(seed, states, compute, [] {});
  }
  CHECK(path.empty() || !std::filesystem::exists(path));
}

// What is added after states that found no room lies where it would without them: behind those before, in their page.
void states_without_room_leave_no_trace() {
  AdamwStates states(make_pager("", 2));
  const auto add = [&](std::int64_t numel) { states.add(std::vector<std::int64_t>{numel}, std::vector<int>{32}); };
  add(100);
  CHECK(contains(error_of([&] { add(2000); }), "expected room for 5 pages"));
  add(100);
  CHECK_EQ(states.stats().pages[static_cast<int>(Tier::None)], 1);
}

// A fork may throw its copy of the pager away, and may not use it; the parent goes on.
void fork_is_inert() {
  const std::string path = file_name("fork");
  auto paged = make_pager(path, 0), in_memory = make_pager("", kUnlimited);
  const auto pages = paged->add(10), others = in_memory->add(3);
  increment(*paged, pages);
  increment(*in_memory, others);
  const pid_t child = fork();
  if (child == 0) {
    alarm(20);
    const bool refused = contains(error_of([&] { increment(*paged, pages); }), "got a fork of it") &&
                         contains(error_of([&] { paged->add(1); }), "got a fork of it");
    increment(*in_memory, others);                 // is memory alone
    const int file = open("/dev/null", O_RDONLY);  // by the number that the page file had
    paged.reset();
    in_memory.reset();
    _exit(refused && std::filesystem::exists(path) && fcntl(file, F_GETFD) != -1 ? 0 : 1);
  }
  for (int i = 0; i < 5; ++i) increment(*paged, pages);
  int status = 0;
  waitpid(child, &status, 0);
  CHECK_EQ(status, 0);
  CHECK(counts(*paged, pages) == std::vector<std::int64_t>(10, 6));
}

// By the number of a file that is closed already another may be open.
void fork_closes_no_strangers_file() {
  make_pager(file_name("gone"), 0).reset();
  const int other = open("/dev/null", O_RDONLY);
  const pid_t child = fork();
  if (child == 0) _exit(fcntl(other, F_GETFD) != -1 ? 0 : 1);
  int status = 0;
  waitpid(child, &status, 0);
  CHECK_EQ(status, 0);
  close(other);
}

// What a DataLoader's worker is to a training that is killed.
void fork_does_not_keep_its_parents_file() {
  const std::string path = file_name("killed");
  const pid_t training = fork();
  if (training == 0) {
    setpgid(0, 0);
    std::signal(SIGHUP, SIG_IGN);  // which stopped processes get when the training is gone
    const auto paged = make_pager(path, 0);
    if (const pid_t worker = fork(); worker == 0) {
      raise(SIGSTOP);  // it has let go of the file by then
      sleep(30);
      _exit(0);
    } else {
      waitpid(worker, nullptr, WUNTRACED);
    }
    raise(SIGSTOP);
  }
  waitpid(training, nullptr, WUNTRACED);
  CHECK(contains(error_of([&] { make_pager(path, 0); }), "another optimizer"));
  kill(training, SIGKILL);
  waitpid(training, nullptr, 0);
  CHECK_EQ(error_of([&] { make_pager(path, 0); }), "");
  kill(-training, SIGKILL);
}

// Of the room, the ring takes a quarter at most, and no more than there are threads.
void the_ring_is_small() {
  const HostBackend backend(kPageBytes, "", 8);
  for (const auto& [room, expected] : std::vector<std::pair<std::int64_t, std::int64_t>>{
           {0, 2}, {3, 2}, {12, 3}, {31, 7}, {32, 8}, {1000, 8}, {kUnlimited, 8}}) {
    CHECK_EQ(backend.ring_pages(room), expected);
  }
  CHECK_EQ(HostBackend(kPageBytes, "", 1).ring_pages(kUnlimited), 2);
}

}  // namespace

int main() {
  the_ring_is_small();
  states_without_room_leave_no_trace();
  for (unsigned seed = 0; seed < 12; ++seed) {
    for (const std::int64_t room : {std::int64_t{0}, std::int64_t{2}, std::int64_t{5}, std::int64_t{20}, kUnlimited}) {
      lives(seed, room, "lives");
    }
  }
  std::thread other([] { lives(100, 2, "one"); });  // two at the same time
  lives(101, 3, "two");
  other.join();
  fork_is_inert();
  fork_closes_no_strangers_file();
  fork_does_not_keep_its_parents_file();
  return failures();
}
