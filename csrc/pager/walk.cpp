// The walk of a pager over its pages.
#include <algorithm>
#include <chrono>
#include <stdexcept>

#include "own_process.h"
#include "pager.h"

namespace qlora::pager {

void Pager::prepare(std::span<const PageId> order) {
  if (!backend_->usable()) refuse_fork();
  if (!failure_.empty()) throw std::runtime_error("PagedAdamW: not usable since an error: " + failure_);
  backend_->check();
  settle(order);
  if (std::ranges::any_of(order, [&](PageId id) { return at(id).level > 0; })) {
    set_ring(static_cast<std::size_t>(tiers_[0].ring));
  }
}

void Pager::walk(std::span<const PageId> order, bool writes, const Visit& visit) {
  prepare(order);
  order_ = order;
  writes_ = writes;
  begun_ = false;
  try {
    if (backend_->compute_tier() == Tier::Host) {
      run_on_host(visit);
    } else {
      run_on_device(visit);
    }
  } catch (const std::exception& error) {
    if (writes && begun_) {
      failure_ = std::string(error.what()) + " (in a walk over " + std::to_string(order.size()) + " pages)";
    }
    throw;
  }
}

void Pager::run_on_host(const Visit& visit) {
  idle_.clear();
  for (const Slot& slot : ring_) idle_.push_back(slot.memory);
  std::vector<std::byte*> pages;
  for (std::size_t position = 0; position < order_.size(); position += pages.size()) {
    const auto run = order_.subspan(position, std::min(kMostAtOnce, order_.size() - position));
    pages.clear();
    std::int64_t hits = 0, read = 0;
    for (const PageId id : run) {
      const Page& page = at(id);
      pages.push_back(page.home.memory);
      hits += page.level == 0;
      read += page.level > 0 && page.written;
    }
    begun_ = begun_ || hits > 0;
    next_pass_ = position;
    run_end_ = position + run.size();
    visit(position, pages);
    for (const PageId id : run) at(id).written |= writes_;
    count_moves(Tier::File, Tier::Host, read);
    if (writes_) count_moves(Tier::Host, Tier::File, std::ssize(run) - hits);
    stats_.visits += std::ssize(run);
    stats_.hits += hits;
  }
}

bool Pager::pass(const std::function<void(std::size_t, std::byte*)>& compute) {
  struct Borrowed {
    Pager& pager;
    std::byte* memory;
    explicit Borrowed(Pager& from) : pager(from) {
      std::unique_lock lock(pager.idle_mutex_);
      pager.idle_again_.wait(lock, [&] { return !pager.idle_.empty(); });
      memory = pager.idle_.back();
      pager.idle_.pop_back();
    }
    ~Borrowed() {
      const std::lock_guard lock(pager.idle_mutex_);
      pager.idle_.push_back(memory);
      pager.idle_again_.notify_one();
    }
  };
  if (ring_.empty()) return false;
  using Clock = std::chrono::steady_clock;
  const auto start = Clock::now();
  const Borrowed borrowed(*this);
  std::unique_lock lock(pass_mutex_);
  while (next_pass_ < run_end_ && at(order_[next_pass_]).level == 0) ++next_pass_;
  if (next_pass_ == run_end_) return false;
  const std::size_t position = next_pass_++;
  // What the system has in its memory, threads read at the same time. From the disk they read one after another, in the
  // order of the file: the system sees one sequential reader, and reads ahead for it.
  if (!backend_->waits_for_disk()) lock.unlock();
  const Page& page = at(order_[position]);
  const Place here{tiers_[0].tier, borrowed.memory};
  backend_->move(page.written ? page.home : Place{}, here, 0, 0);
  if (lock) lock.unlock();
  begun_ = true;
  const auto begin = Clock::now();
  compute(position, here.memory);
  const auto end = Clock::now();
  if (writes_) backend_->move(here, page.home, 0, 0);
  waited_ += std::chrono::nanoseconds(begin - start + (Clock::now() - end)).count();
  return true;
}

void Pager::run_on_device(const Visit& visit) {
  const std::span<const PageId> order = order_;
  const bool writes = writes_;
  std::vector<PageId> streamed;
  for (const PageId id : order) {
    if (at(id).level > 0) streamed.push_back(id);
  }
  const std::size_t ring = ring_.size();
  const auto slot_of = [&](std::size_t i) -> Slot& { return ring_[(turn_ + i) % ring]; };
  // The i-th page to stream from now on, if it is not in its slot already. The walk comes back to its pages: the first
  // of the next walk are requested at the end of this one.
  const auto request = [&](std::size_t i) {
    const PageId id = streamed[i % streamed.size()];
    Slot& slot = slot_of(i);
    if (slot.page == id) {
      slot.ready = slot.idle;  // it may still be on its way out
      return;
    }
    Page& page = at(id);
    for (Slot& other : ring_) {
      if (other.page == id) other.page = -1;  // this one's will be the newer content
    }
    slot.page = -1;  // if this fails
    slot.ready = slot.idle =
        move(page.written ? page.home : Place{}, {tiers_[0].tier, slot.memory}, page.stored, slot.idle);
    slot.page = id;
  };
  for (std::size_t i = 0; i < std::min(ring, streamed.size()); ++i) request(i);

  std::size_t next = 0;
  std::vector<std::byte*> pages;
  for (std::size_t position = 0; position < order.size(); position += pages.size()) {
    pages.clear();
    const auto home = order.subspan(position, std::min(kMostAtOnce, order.size() - position));
    for (const PageId id : home) {
      if (at(id).level > 0) break;
      backend_->before_compute(at(id).stored);
      pages.push_back(at(id).home.memory);
    }
    stats_.visits += std::max<std::int64_t>(1, std::ssize(pages));
    if (!pages.empty()) {
      stats_.hits += std::ssize(pages);
      begun_ = true;
      visit(position, pages);
      const Token computed = backend_->after_compute();
      for (const PageId id : home.first(pages.size())) {
        at(id).stored = computed;
        at(id).written |= writes;
      }
      continue;
    }
    Page& page = at(order[position]);
    Slot& slot = slot_of(next);
    pages.push_back(slot.memory);
    backend_->before_compute(slot.ready);
    begun_ = true;
    visit(position, pages);
    slot.idle = backend_->after_compute();
    if (writes) {
      slot.idle = page.stored = move({tiers_[0].tier, slot.memory}, page.home, slot.idle, 0);
      page.written = true;
    }
    ++next;
    // The slot is the one for the page a ring further.
    if (const std::size_t i = next - 1 + ring; i < streamed.size() || (writes && streamed.size() > ring)) request(i);
  }
  if (streamed.size() > ring) turn_ = (turn_ + next) % ring;  // else each page keeps its slot
}

}  // namespace qlora::pager
