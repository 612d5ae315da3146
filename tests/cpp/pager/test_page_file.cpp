// The page file under the host backend: what is done to it from outside, and what it leaves.
#include <fcntl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <chrono>
#include <csignal>
#include <fstream>
#include <thread>

#include "host_pager.h"

using namespace qlora::pager;

namespace {

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
void with_files_of(rlim_t bytes, const std::function<void()>& work) {
  rlimit limit{};
  getrlimit(RLIMIT_FSIZE, &limit);
  const rlimit small{bytes, limit.rlim_max};
  setrlimit(RLIMIT_FSIZE, &small);
  work();
  setrlimit(RLIMIT_FSIZE, &limit);
}

void full_disk_is_an_error_before() {
  const std::string path = file_name("full");
  auto pager = make_pager(path, 2);
  const auto pages = pager->add(6);
  const auto size = std::filesystem::file_size(path);
  CHECK(size >= 6 * kPageBytes);  // reserved before any of it is needed
  CHECK_EQ(size, 7 * kPageBytes);
  increment(*pager, pages);
  CHECK_EQ(std::filesystem::file_size(path), size);
  with_files_of(64 * 1024, [&] { CHECK(contains(error_of([&] { pager->add(1000); }), "reserve")); });
  CHECK_EQ(pager->count(), 6);
  CHECK_EQ(std::filesystem::file_size(path), size);
  increment(*pager, pages);  // those before are as they were
  CHECK(counts(*pager, pages) == std::vector<std::int64_t>(6, 2));
  CHECK_EQ(first_word(path), "qlora_ext");  // no page lies there
}

// Even if nothing was reserved before: what a killed process leaves then is known for a page file.
void full_disk_leaves_the_header() {
  const std::string path = file_name("full_at_first");
  HostBackend backend(kPageBytes, path, kThreads);
  with_files_of(64 * 1024, [&] { CHECK(contains(error_of([&] { backend.reserve_file(1 << 20); }), "reserve")); });
  backend.reserve_file(kPageBytes);
  CHECK_EQ(first_word(path), "qlora_ext");
}

void foreign_file_is_left_alone() {
  const std::string path = file_name("foreign");
  std::ofstream(path) << "precious";
  CHECK(contains(error_of([&] { HostBackend backend(kPageBytes, path, kThreads); }), "other content"));
  CHECK_EQ(first_word(path), "precious");
  std::filesystem::remove(path);
  CHECK(contains(error_of([&] { HostBackend backend(kPageBytes, "/nonexistent/pages", kThreads); }), "open"));
  const HostBackend first(kPageBytes, path, kThreads);
  CHECK(contains(error_of([&] { HostBackend backend(kPageBytes, path, kThreads); }), "another optimizer"));
}

// Of what is longer than one piece of the reservation, nothing is kept where the disk is full in a later one.
void a_reservation_is_undone_whole() {
  const std::string path = file_name("pieces");
  HostBackend backend(kPageBytes, path, kThreads);
  backend.reserve_file(kPageBytes);
  with_files_of((1 << 26) + (1 << 20),
                [&] { CHECK(contains(error_of([&] { backend.reserve_file(1 << 27); }), "reserve")); });
  CHECK_EQ(std::filesystem::file_size(path), kPageBytes);
}

void no_room_for_the_header_is_an_error() {
  const std::string path = file_name("header");
  with_files_of(10, [&] { CHECK(contains(error_of([&] { HostBackend(kPageBytes, path, kThreads); }), "write")); });
  std::filesystem::remove(path);
}

// Pages that are added to a truncated file do not make it whole.
void truncated_before_pages_are_added() {
  const std::string path = file_name("added");
  auto pager = make_pager(path, 0);
  const auto pages = pager->add(10);
  increment(*pager, pages);
  std::filesystem::resize_file(path, 5000);
  CHECK(contains(error_of([&] { pager->add(10); }), "truncated"));
  CHECK(contains(error_of([&] { increment(*pager, pages); }), "truncated"));
}

// Truncated and made as long again: it has fewer blocks. And once it was found so, not even those help.
void truncated_and_lengthened() {
  const std::string path = file_name("lengthened");
  auto pager = make_pager(path, 0);
  const auto pages = pager->add(10);
  increment(*pager, pages);
  const auto size = std::filesystem::file_size(path);
  std::filesystem::resize_file(path, 5000);
  std::filesystem::resize_file(path, size);
  CHECK(contains(error_of([&] { increment(*pager, pages); }), "truncated"));
  const int other = open(path.c_str(), O_RDWR);
  CHECK_EQ(posix_fallocate(other, 0, static_cast<off_t>(size)), 0);
  close(other);
  CHECK(contains(error_of([&] { increment(*pager, pages); }), "truncated"));
}

// The same under a walk, which would read zeros, or write behind the end.
void truncated_and_lengthened_under_the_walk(bool writes, int at_visit, bool lengthened) {
  const std::string path = file_name("lengthened_under");
  auto pager = make_pager(path, 0);
  const auto pages = pager->add(10);
  increment(*pager, pages);
  const auto size = std::filesystem::file_size(path);
  int visited = 0;
  const std::string error = error_of([&] {
    walk(*pager, pages, writes, [&](std::size_t, std::byte*) {
      if (++visited != at_visit) return;
      std::filesystem::resize_file(path, 4096);
      if (lengthened) std::filesystem::resize_file(path, size);
    });
  });
  CHECK(contains(error, "truncated"));
  CHECK_EQ(visited, at_visit);
}

// Pages at home are visited before any of the file is read: it is looked at before that.
void truncated_is_seen_before_pages_at_home_are_visited() {
  const std::string path = file_name("at_home");
  auto pager = make_pager(path, 10);
  const auto pages = pager->add(20);
  increment(*pager, pages);
  std::filesystem::resize_file(path, 5000);
  int called = 0;
  CHECK(contains(error_of([&] { pager->walk(pages, true, [&](auto, auto) { ++called; }); }), "truncated"));
  CHECK_EQ(called, 0);
}

void what_fits_needs_no_file() {
  const std::string path = file_name("fits");
  auto pager = make_pager(path, 8);
  const auto pages = pager->add(8);
  increment(*pager, pages);
  increment(*pager, pages);
  CHECK(static_cast<std::int64_t>(std::filesystem::file_size(path)) < kPageBytes);
}

// Only what was written has a content: a page of another's room begins with zeros, though it has been read.
void what_is_read_is_not_written() {
  const std::string path = file_name("read");
  auto pager = make_pager(path, 0);
  auto pages = pager->add(10);
  increment(*pager, pages);
  for (const PageId page : pages) pager->remove(page);
  pages = pager->add(10);
  for (int i = 0; i < 2; ++i) CHECK(counts(*pager, pages) == std::vector<std::int64_t>(10, 0));
  increment(*pager, pages);
  const auto before = std::filesystem::last_write_time(path);
  std::this_thread::sleep_for(std::chrono::milliseconds(30));
  CHECK(counts(*pager, pages) == std::vector<std::int64_t>(10, 1));
  CHECK(std::filesystem::last_write_time(path) == before);
}

// The descriptor of what /proc/self/fd has under this name; -1 if there is none.
int descriptor_of(const std::string& name) {
  for (int descriptor = 3; descriptor < 256; ++descriptor) {
    std::array<char, 4096> target{};
    const std::string link = "/proc/self/fd/" + std::to_string(descriptor);
    if (readlink(link.c_str(), target.data(), target.size() - 1) > 0 && target.data() == name) return descriptor;
  }
  return -1;
}

void the_file_is_its_owners_alone_and_closed_at_the_end() {
  const std::string path = file_name("owner");
  {
    auto pager = make_pager(path, 0);
    CHECK(std::filesystem::status(path).permissions() == std::filesystem::perms{0600});
    CHECK((fcntl(descriptor_of(path), F_GETFD) & FD_CLOEXEC) != 0);
  }
  CHECK_EQ(descriptor_of(path), -1);
  CHECK_EQ(descriptor_of(path + " (deleted)"), -1);
}

void what_a_killed_process_left_takes_no_space() {
  const std::string path = file_name("left");
  if (const pid_t child = fork(); child == 0) {
    auto pager = make_pager(path, 0);
    pager->add(300);
    raise(SIGKILL);
  } else {
    waitpid(child, nullptr, 0);
  }
  CHECK(std::filesystem::file_size(path) >= 300 * kPageBytes);
  auto pager = make_pager(path, 0);
  CHECK(std::filesystem::file_size(path) < kPageBytes);
}

}  // namespace

int main() {
  std::signal(SIGXFSZ, SIG_IGN);
  deleted_file_goes_on();
  truncated_file_is_an_error();
  truncated_under_the_walk();
  a_first_read_fails_after_pages_at_home();
  full_disk_is_an_error_before();
  full_disk_leaves_the_header();
  foreign_file_is_left_alone();
  a_reservation_is_undone_whole();
  no_room_for_the_header_is_an_error();
  truncated_before_pages_are_added();
  truncated_and_lengthened();
  truncated_and_lengthened_under_the_walk(false, 5, true);
  truncated_and_lengthened_under_the_walk(true, 10, false);
  truncated_is_seen_before_pages_at_home_are_visited();
  what_fits_needs_no_file();
  what_is_read_is_not_written();
  the_file_is_its_owners_alone_and_closed_at_the_end();
  what_a_killed_process_left_takes_no_space();
  return failures();
}
