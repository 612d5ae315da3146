// Pages of one size over the tiers of a machine, and the walk that computes on them one after another.
//
// Each page has its home in one tier. Those at home in the compute tier are computed where they are, and stay while
// walks need the same. The others pass through a ring of pages there. A device that computes by itself finds them there
// one after another: while it computes one, the next is moved in and the last moved out. Of the host, each thread that
// computes takes one, moves it in, computes it and moves it out: it remains in the core's cache, and no thread waits
// for another.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <iterator>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "backend.h"
#include "residency.h"

namespace qlora::pager {

using PageId = std::int64_t;

struct Stats {
  std::int64_t pages[kNumTiers] = {};                                 // at home in each Tier
  std::int64_t ring_pages = 0;                                        // that exist now
  std::int64_t visits = 0, hits = 0;                                  // of pages, by all walks; those in place
  std::int64_t bytes_from[kNumTiers] = {}, bytes_to[kNumTiers] = {};  // moved, by Tier
  double seconds_waited = 0;                                          // for moves, by all threads that would compute
};

class Pager {
 public:
  // Tiers from the compute tier down.
  Pager(std::unique_ptr<Backend> backend, std::vector<TierRoom> tiers);
  ~Pager();
  Pager(const Pager&) = delete;
  Pager& operator=(const Pager&) = delete;

  // Pages of zeros, which take no memory before a walk writes them. Throws if the tiers have no room for them all, or
  // the disk none for what falls to the file; then there are no more pages than before.
  std::vector<PageId> add(std::int64_t count);
  void remove(PageId id);
  std::int64_t count() const { return std::ssize(pages_) - std::ssize(unused_); }
  std::int64_t page_bytes() const { return backend_->page_bytes(); }

  // Calls visit(position, pages) for all pages of `order`, none of which stands there twice, run by run: those from
  // `position` on, at most kMostAtOnce, in any order and by any threads. On the host, those at home elsewhere are null:
  // the visit calls pass() until it returns false. What it computes on them is kept if `writes`. Throws before the
  // first visit if it can be known that not all pages can be had. If a page fails later, the rest is not visited and
  // this walk throws; so does every later one if it had begun to write.
  using Visit = std::function<void(std::size_t position, std::span<std::byte* const> pages)>;
  static constexpr std::size_t kMostAtOnce = 256;
  void walk(std::span<const PageId> order, bool writes, const Visit& visit);

  // Finds homes for these pages, and room to pass through, and throws what can be known before a walk over them: what
  // walk() begins with. For several pagers, of which none is to be walked if another cannot be.
  void prepare(std::span<const PageId> order);

  // Calls compute(position, memory) for the next of the run's pages that are null; false: there is none left.
  // most_passing() threads may be in it at the same time, others wait.
  bool pass(const std::function<void(std::size_t position, std::byte* memory)>& compute);
  std::int64_t most_passing() const { return std::ssize(ring_); }

  Stats stats() const;
  Backend& backend() { return *backend_; }

 private:
  struct Page {
    int level = -1;  // of its home among the tiers; -1: it has none yet
    Place home;
    bool written = false;  // else it counts as zeros, whatever its home holds
    Token stored = 0;      // after which the home has its content
    std::uint64_t last_need = 0;
  };
  struct Slot {
    std::byte* memory = nullptr;
    PageId page = -1;           // whose content it has, or will have when it is ready
    Token ready = 0, idle = 0;  // after which its content has arrived; later: nothing uses that any more
  };

  Page& at(PageId page) { return pages_[static_cast<std::size_t>(page)]; }
  void finish(Token token);
  void settle(std::span<const PageId> order);
  void rehome(Page& page, int level);
  Place allocate(int level);
  void free(int level, const Place& place);
  bool has_room(int level) const;
  void set_ring(std::size_t size);
  void run_on_device(const Visit& visit);
  void run_on_host(const Visit& visit);
  void count_moves(Tier from, Tier to, std::int64_t pages);
  Token move(const Place& from, const Place& to, Token after_source, Token after_target);

  std::unique_ptr<Backend> backend_;
  std::vector<TierRoom> tiers_;
  std::vector<std::int64_t> used_;  // homes in each level
  std::vector<Page> pages_;
  std::vector<PageId> unused_;              // numbers of removed pages
  std::vector<std::int64_t> free_offsets_;  // in the file
  std::int64_t file_pages_ = 1;             // reserved there; the first is the file's own
  std::vector<Slot> ring_;
  std::size_t turn_ = 0;  // the slot of the next page to stream
  std::uint64_t walks_ = 0;
  // Of the walk under way:
  std::span<const PageId> order_;
  bool writes_ = false;
  std::size_t next_pass_ = 0, run_end_ = 0;  // positions
  std::mutex pass_mutex_;                    // of these
  std::vector<std::byte*> idle_;             // memory of the ring that no thread has
  std::mutex idle_mutex_;
  std::condition_variable idle_again_;
  std::atomic<bool> begun_ = false;       // something may have been computed
  std::atomic<std::int64_t> waited_ = 0;  // nanoseconds, by threads in pass()
  std::string failure_;
  Stats stats_;
};

}  // namespace qlora::pager
