// Threads that pass pages of a lower tier through the memory of the host.
#include <atomic>
#include <chrono>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "../check.h"
#include "pager/host_memory.h"
#include "pager/pager.h"

using namespace qlora::pager;

namespace {

constexpr std::int64_t kPageBytes = 4096;
constexpr int kThreads = 4;

// How many are in something at the same time.
class Inside {
 public:
  void enter() {
    const int now = ++inside_;
    for (int seen = most_; seen < now && !most_.compare_exchange_weak(seen, now);) continue;
    std::this_thread::sleep_for(std::chrono::microseconds(300));
    --inside_;
  }
  int most() const { return most_; }

 private:
  std::atomic<int> inside_ = 0, most_ = 0;
};

// A host whose file is memory that takes its time, and has to be waited for or not.
class SlowFile final : public Backend {
 public:
  explicit SlowFile(bool waits) : Backend(kPageBytes), waits_(waits) {}

  Tier compute_tier() const override { return Tier::Host; }
  std::int64_t ring_pages(std::int64_t) const override { return 2; }
  std::byte* allocate(Tier, std::int64_t) override { return allocate_host(kPageBytes); }
  void release(Tier, std::byte* memory) override { release_host(memory, kPageBytes); }
  Token move(const Place& from, const Place& to, Token, Token) override {
    constexpr auto size = static_cast<std::size_t>(kPageBytes);
    if (from.tier == Tier::None) std::memset(to.memory, 0, size);
    for (const Place& place : {from, to}) {
      if (place.tier == Tier::File) CHECK(place.offset > 0 && place.offset % kPageBytes == 0);
    }
    if (to.tier == Tier::File) std::memcpy(&file_[static_cast<std::size_t>(to.offset)], from.memory, size);
    if (from.tier == Tier::File) {
      in_order = in_order && from.offset > last_.exchange(from.offset);
      readers.enter();
      std::memcpy(to.memory, &file_[static_cast<std::size_t>(from.offset)], size);
    }
    return 0;
  }
  void before_compute(Token) override {}
  Token after_compute() override { return 0; }
  void wait(Token) override {}
  void check() const override { last_ = -1; }
  void reserve_file(std::int64_t bytes) override { file_.resize(static_cast<std::size_t>(bytes)); }
  bool usable() const override { return true; }
  void read(const std::byte*, std::byte*, std::int64_t) override {}
  void write(const std::byte*, std::byte*, std::int64_t) override {}
  bool waits_for_disk() const override { return waits_; }

  Inside readers;
  std::atomic<bool> in_order = true;

 private:
  bool waits_;
  std::vector<std::byte> file_;
  mutable std::atomic<std::int64_t> last_ = -1;
};

// Each page is computed once a walk, what is computed is kept, and no more threads compute than there are pages in the
// ring. They read at the same time, but a disk that has to work one after another, in the order of the file.
void walks(bool waits) {
  auto made = std::make_unique<SlowFile>(waits);
  const SlowFile& backend = *made;
  Pager pager(std::move(made), {{Tier::Host, 0, 2}, {Tier::File, kUnlimited, 0}});
  const std::vector<PageId> pages = pager.add(600);
  Inside computing;
  for (std::int64_t round = 0; round < 3; ++round) {
    std::atomic<std::size_t> visited = 0;
    const auto compute = [&](std::size_t, std::byte* memory) {
      CHECK_EQ((*reinterpret_cast<std::int64_t*>(memory))++, round);
      ++visited;
      computing.enter();
    };
    pager.walk(pages, true, [&](std::size_t, std::span<std::byte* const> run) {
      for (std::byte* const memory : run) CHECK(memory == nullptr);
      std::vector<std::thread> threads;
      for (int i = 0; i < kThreads; ++i) {
        threads.emplace_back([&] {
          while (pager.pass(compute)) continue;
        });
      }
      for (std::thread& thread : threads) thread.join();
    });
    CHECK_EQ(visited, pages.size());
  }
  CHECK_EQ(computing.most(), pager.most_passing());
  CHECK_EQ(backend.readers.most(), waits ? 1 : 2);
  if (waits) CHECK(backend.in_order);
}

}  // namespace

int main() {
  walks(true);
  walks(false);
  return failures();
}
