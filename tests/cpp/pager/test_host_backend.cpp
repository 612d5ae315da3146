// The host backend on real files: random lives, faults of the file, forks.
#include <fcntl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <csignal>
#include <filesystem>
#include <fstream>
#include <system_error>
#include <thread>

#include "pager/backend_host.h"
#include "states_test.h"

using namespace qlora;
using namespace qlora::pager;

namespace {

constexpr std::int64_t kPageBytes = 4096;
constexpr int kThreads = 3;

std::string file_name(const std::string& name) {
  return (std::filesystem::temp_directory_path() / ("qlora_test_host_backend_" + name + std::to_string(getpid())))
      .string();
}

std::unique_ptr<Pager> make_pager(const std::string& path, std::int64_t room) {
  auto backend = std::make_unique<HostBackend>(path, kThreads);
  std::vector<TierRoom> tiers = {{Tier::Host, room, backend->ring_pages(room)}};
  if (!path.empty()) tiers.push_back({Tier::File, kUnlimited, 0});
  return std::make_unique<Pager>(std::move(backend), kPageBytes, tiers);
}

// Calls `work` in so many threads, and returns when all have.
void in_threads(int count, const std::function<void()>& work) {
  std::vector<std::thread> threads;
  for (int i = 1; i < count; ++i) threads.emplace_back(work);
  work();
  for (std::thread& thread : threads) thread.join();
}

// A walk of one thread: visit(position, memory) for each page.
void walk(Pager& pager, const std::vector<PageId>& pages, bool writes,
          const std::function<void(std::size_t, std::byte*)>& visit) {
  pager.walk(pages, writes, [&](std::size_t position, std::span<std::byte* const> run) {
    for (std::byte* const memory : run) {
      if (memory != nullptr) {
        visit(position, memory);
      } else {
        CHECK(pager.pass(visit));
      }
      ++position;
    }
  });
}

void increment(Pager& pager, const std::vector<PageId>& pages) {
  walk(pager, pages, true, [](std::size_t, std::byte* memory) { ++*reinterpret_cast<std::int64_t*>(memory); });
}

// The count of each page; -1 if it cannot be had.
std::vector<std::int64_t> counts(Pager& pager, const std::vector<PageId>& pages) {
  std::vector<std::int64_t> counted(pages.size(), -1);
  walk(pager, pages, false, [&](std::size_t i, std::byte* at) { counted[i] = *reinterpret_cast<std::int64_t*>(at); });
  return counted;
}

// What it throws, or nothing.
std::string error_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

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

void deleted_file_goes_on() {
  const std::string path = file_name("deleted");
  auto pager = make_pager(path, 0);
  const auto pages = pager->add(10);
  increment(*pager, pages);
  std::filesystem::remove(path);
  std::ofstream(path) << "someone else's";
  increment(*pager, pages);
  CHECK(counts(*pager, pages) == std::vector<std::int64_t>(10, 2));
  pager.reset();
  CHECK(std::filesystem::exists(path));
  std::filesystem::remove(path);
}

void truncated_file_is_an_error() {
  const std::string path = file_name("truncated");
  auto pager = make_pager(path, 4);
  const auto pages = pager->add(10);
  increment(*pager, pages);
  increment(*pager, pages);
  std::filesystem::resize_file(path, 5000);
  int visited = 0;
  const auto visits = [&] { walk(*pager, pages, true, [&](std::size_t, std::byte*) { ++visited; }); };
  CHECK(contains(error_of(visits), "truncated"));
  CHECK_EQ(visited, 0);
  // Nor does a longer file make it good again.
  std::filesystem::resize_file(path, 1 << 20);
  CHECK(contains(error_of(visits), "page_file"));
  CHECK_EQ(visited, 0);
}

// Truncated while a walk is under way: the rest is not visited, and no later walk goes on with half a step.
void truncated_under_the_walk() {
  const std::string path = file_name("under");
  auto pager = make_pager(path, 0);
  const auto pages = pager->add(20);
  increment(*pager, pages);
  int visited = 0;
  const auto visits = [&] {
    walk(*pager, pages, true, [&](std::size_t, std::byte*) {
      if (++visited == 5) std::filesystem::resize_file(path, 4096);
    });
  };
  CHECK(contains(error_of(visits), "truncated"));
  CHECK_EQ(visited, 5);
  CHECK(!error_of(visits).empty());
  std::filesystem::resize_file(path, 1 << 20);
  const std::string error = error_of(visits);
  CHECK(contains(error, "not usable since an error") && contains(error, "over 20 pages"));
  CHECK_EQ(visited, 5);
}

// What is at home was computed before the first page of the file failed: no later walk goes on with half a step.
void a_first_read_fails_after_pages_at_home() {
  const std::string path = file_name("first");
  auto pager = make_pager(path, 4);
  const auto pages = pager->add(20);
  increment(*pager, pages);
  int visited = 0;
  const auto visits = [&] {
    pager->walk(pages, true, [&](std::size_t, std::span<std::byte* const>) {
      ++visited;
      std::filesystem::resize_file(path, 4096);
      pager->pass([](std::size_t, std::byte*) { CHECK(false); });
    });
  };
  CHECK(contains(error_of(visits), "truncated"));
  CHECK(contains(error_of(visits), "not usable since an error"));
  CHECK_EQ(visited, 1);
}

std::string first_word(const std::string& path) {
  std::string word;
  std::ifstream(path) >> word;
  return word;
}

// A file that may not grow stands for a disk that is full.
void full_disk_is_an_error_before() {
  const std::string path = file_name("full");
  auto pager = make_pager(path, 2);
  const auto pages = pager->add(6);
  const auto size = std::filesystem::file_size(path);
  CHECK(size >= 6 * kPageBytes);  // reserved before any of it is needed
  CHECK_EQ(size, 7 * kPageBytes);
  increment(*pager, pages);
  CHECK_EQ(std::filesystem::file_size(path), size);
  std::signal(SIGXFSZ, SIG_IGN);
  rlimit limit{};
  getrlimit(RLIMIT_FSIZE, &limit);
  const rlimit small{64 * 1024, limit.rlim_max};
  setrlimit(RLIMIT_FSIZE, &small);
  CHECK(contains(error_of([&] { pager->add(1000); }), "reserve"));
  setrlimit(RLIMIT_FSIZE, &limit);
  CHECK_EQ(pager->count(), 6);
  CHECK_EQ(std::filesystem::file_size(path), size);
  increment(*pager, pages);  // those before are as they were
  CHECK(counts(*pager, pages) == std::vector<std::int64_t>(6, 2));
  CHECK_EQ(first_word(path), "qlora_ext");  // no page lies there
}

// Even if nothing was reserved before: what a killed process leaves then is known for a page file.
void full_disk_leaves_the_header() {
  const std::string path = file_name("full_at_first");
  HostBackend backend(path, kThreads);
  rlimit limit{};
  getrlimit(RLIMIT_FSIZE, &limit);
  const rlimit small{64 * 1024, limit.rlim_max};
  setrlimit(RLIMIT_FSIZE, &small);
  CHECK(contains(error_of([&] { backend.reserve_file(1 << 20); }), "reserve"));
  setrlimit(RLIMIT_FSIZE, &limit);
  backend.reserve_file(kPageBytes);
  CHECK_EQ(first_word(path), "qlora_ext");
}

void foreign_file_is_left_alone() {
  const std::string path = file_name("foreign");
  std::ofstream(path) << "precious";
  CHECK(contains(error_of([&] { HostBackend backend(path, kThreads); }), "other content"));
  CHECK_EQ(first_word(path), "precious");
  std::filesystem::remove(path);
  CHECK(contains(error_of([&] { HostBackend backend("/nonexistent/pages", kThreads); }), "open"));
  const HostBackend first(path, kThreads);
  CHECK(contains(error_of([&] { HostBackend backend(path, kThreads); }), "another optimizer"));
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
    const bool refused = contains(error_of([&] { increment(*paged, pages); }), "got a fork of it");
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

// What a DataLoader's worker is to a training that is killed.
void fork_does_not_keep_its_parents_file() {
  const std::string path = file_name("killed");
  const pid_t training = fork();
  if (training == 0) {
    setpgid(0, 0);
    const auto paged = make_pager(path, 0);
    if (const pid_t worker = fork(); worker != 0) waitpid(worker, nullptr, WUNTRACED);
    raise(SIGSTOP);  // the worker first, which has let go of the file by then
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
  const HostBackend backend("", 8);
  for (const auto& [room, expected] : std::vector<std::pair<std::int64_t, std::int64_t>>{
           {0, 2}, {3, 2}, {12, 3}, {31, 7}, {32, 8}, {1000, 8}, {kUnlimited, 8}}) {
    CHECK_EQ(backend.ring_pages(room), expected);
  }
  CHECK_EQ(HostBackend("", 1).ring_pages(kUnlimited), 2);
}

}  // namespace

int main() {
  the_ring_is_small();
  for (unsigned seed = 0; seed < 12; ++seed) {
    for (const std::int64_t room : {std::int64_t{0}, std::int64_t{2}, std::int64_t{5}, std::int64_t{20}, kUnlimited}) {
      lives(seed, room, "lives");
    }
  }
  std::thread other([] { lives(100, 2, "one"); });  // two at the same time
  lives(101, 3, "two");
  other.join();
  deleted_file_goes_on();
  truncated_file_is_an_error();
  truncated_under_the_walk();
  a_first_read_fails_after_pages_at_home();
  full_disk_is_an_error_before();
  full_disk_leaves_the_header();
  foreign_file_is_left_alone();
  fork_is_inert();
  fork_does_not_keep_its_parents_file();
  return failures();
}
