#include "pager.h"

#include <algorithm>
#include <functional>
#include <stdexcept>
#include <utility>

#include "own_process.h"

namespace qlora::pager {

Pager::Pager(std::unique_ptr<Backend> backend, std::vector<TierRoom> tiers)
    : backend_(std::move(backend)), tiers_(std::move(tiers)), used_(tiers_.size()) {}

Pager::~Pager() {
  for (Slot& slot : ring_) {
    finish(slot.idle);
    backend_->release(tiers_[0].tier, slot.memory);
  }
  for (Page& page : pages_) {
    finish(page.stored);
    if (page.home.memory != nullptr) backend_->release(page.home.tier, page.home.memory);
  }
}

// Until this work is over, be it done or failed: the next walk reports that. In a fork of the process, nothing moves.
void Pager::finish(Token token) {
  if (!backend_->usable()) return;
  try {
    backend_->wait(token);
  } catch (const std::exception&) {
  }
}

std::vector<PageId> Pager::add(std::int64_t count) {
  if (!backend_->usable()) refuse_fork();
  // What the tiers above the file cannot hold of all the pages.
  const std::int64_t all = this->count() + count;
  std::int64_t left = all;
  for (const TierRoom& room : tiers_) {
    if (room.tier == Tier::File) break;
    const std::int64_t ring = &room == &tiers_.back() ? 0 : room.ring;  // nothing passes through the last
    left = room.pages >= left ? 0 : left - std::max<std::int64_t>(0, room.pages - ring);
  }
  if (tiers_.back().tier == Tier::File) {
    if (const std::int64_t wanted = 1 + left; wanted > file_pages_) {
      backend_->reserve_file(wanted * page_bytes());
      for (std::int64_t page = wanted; page-- > file_pages_;) free_offsets_.push_back(page * page_bytes());
      file_pages_ = wanted;
    }
  } else if (left > 0) {
    throw std::length_error("expected room for " + std::to_string(all) + " pages of " + std::to_string(page_bytes()) +
                            " bytes, got room for " + std::to_string(all - left));
  }
  std::vector<PageId> added;
  while (count-- > 0) {
    if (unused_.empty()) {
      unused_.push_back(std::ssize(pages_));
      pages_.emplace_back();
    }
    added.push_back(unused_.back());
    unused_.pop_back();
  }
  return added;
}

void Pager::remove(PageId id) {
  Page& page = at(id);
  finish(page.stored);
  for (Slot& slot : ring_) {
    finish(slot.ready);  // perhaps another page's, moved in after this one, which nothing has visited
    if (slot.page == id) slot.page = -1;
  }
  if (page.level >= 0) free(page.level, page.home);
  page = Page();
  unused_.push_back(id);
}

bool Pager::has_room(int level) const {
  const auto index = static_cast<std::size_t>(level);
  return tiers_[index].tier == Tier::File || used_[index] < tiers_[index].pages;
}

Place Pager::allocate(int level) {
  const TierRoom& room = tiers_[static_cast<std::size_t>(level)];
  std::int64_t& used = used_[static_cast<std::size_t>(level)];
  Place place{.tier = room.tier};
  if (room.tier != Tier::File) {
    place.memory = backend_->allocate(room.tier, std::max<std::int64_t>(1, room.pages - room.ring - used));
  } else {
    if (free_offsets_.empty()) {
      backend_->reserve_file((file_pages_ + 1) * page_bytes());
      free_offsets_.push_back(file_pages_++ * page_bytes());
    }
    place.offset = free_offsets_.back();
    free_offsets_.pop_back();
  }
  ++used;
  return place;
}

void Pager::free(int level, const Place& place) {
  if (place.tier == Tier::File) {
    free_offsets_.push_back(place.offset);
  } else {
    backend_->release(place.tier, place.memory);
  }
  --used_[static_cast<std::size_t>(level)];
}

void Pager::count_moves(Tier from, Tier to, std::int64_t pages) {
  stats_.bytes_from[static_cast<int>(from)] += pages * page_bytes();
  stats_.bytes_to[static_cast<int>(to)] += pages * page_bytes();
}

Token Pager::move(const Place& from, const Place& to, Token after_source, Token after_target) {
  if (from.tier != Tier::None) count_moves(from.tier, to.tier, 1);
  return backend_->move(from, to, after_source, after_target);
}

void Pager::set_ring(std::size_t size) {
  while (ring_.size() > size) {
    backend_->wait(ring_.back().idle);
    backend_->release(tiers_[0].tier, ring_.back().memory);
    ring_.pop_back();
  }
  while (ring_.size() < size) {
    const auto missing = static_cast<std::int64_t>(size - ring_.size());
    ring_.push_back({.memory = backend_->allocate(tiers_[0].tier, missing)});
  }
}

void Pager::rehome(Page& page, int level) {
  const Place home = allocate(level);
  try {
    if (page.written) page.stored = move(page.home, home, page.stored, 0);
    backend_->wait(page.stored);
  } catch (...) {
    free(level, home);
    throw;
  }
  if (page.level >= 0) free(page.level, page.home);
  page.home = home;
  page.level = level;
}

// Gives each page of the walk its home. Where every page has one, and the walk is as before, nothing is done.
void Pager::settle(std::span<const PageId> order) {
  ++walks_;
  std::vector<Candidate> candidates;
  std::vector<PageId> ids(order.begin(), order.end());
  for (const PageId id : order) {
    candidates.push_back({at(id).level, std::ssize(candidates), at(id).last_need});
    at(id).last_need = walks_;
  }
  for (PageId id = 0; id < std::ssize(pages_); ++id) {
    if (at(id).level < 0 || at(id).last_need == walks_) continue;
    candidates.push_back({at(id).level, -1, at(id).last_need});
    ids.push_back(id);
  }
  const std::vector<int> chosen = choose_levels(candidates, tiers_);

  std::vector<std::pair<PageId, int>> down, up;  // last first
  for (std::size_t i = ids.size(); i-- > 0;) {
    const int level = at(ids[i]).level;
    if (level != chosen[i]) (level >= 0 && level < chosen[i] ? down : up).emplace_back(ids[i], chosen[i]);
  }
  if (!down.empty() || !up.empty()) set_ring(0);  // its room may be needed, and what is in it be of another home
  // From the end of both: what leaves the lowest tier first, then what goes there; what comes up from nearest first,
  // and last what is new.
  std::ranges::stable_sort(down, {}, [&](const auto& change) { return at(change.first).level; });
  std::ranges::stable_sort(up, std::greater{}, [&](const auto& change) {
    const int level = at(change.first).level;
    return level < 0 ? static_cast<int>(std::ssize(tiers_)) : level;
  });
  // Where a page would have to wait for another to leave, that goes first. If two wait for each other, the lower tier
  // holds one page too many for a moment.
  while (!down.empty() || !up.empty()) {
    const bool wait = !down.empty() && !has_room(down.back().second) && !up.empty() && has_room(up.back().second);
    auto& changes = down.empty() || wait ? up : down;
    rehome(at(changes.back().first), changes.back().second);
    changes.pop_back();
  }
}

Stats Pager::stats() const {
  Stats stats = stats_;
  for (const Page& page : pages_) ++stats.pages[static_cast<int>(page.home.tier)];
  stats.pages[static_cast<int>(Tier::None)] -= std::ssize(unused_);
  stats.ring_pages = std::ssize(ring_);
  stats.seconds_waited = backend_->seconds_waited() + static_cast<double>(waited_) * 1e-9;
  return stats;
}

}  // namespace qlora::pager
