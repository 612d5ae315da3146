// Which page has its home in which tier, for a walk over some of the pages.
//
// A walk comes back to its pages in the same order, step after step. Evicting the page that was used least recently
// would evict the one that is needed next, so that every page would move in every step. So pages that are needed keep
// their homes, and what is evicted for them is what the walk does not need, the least recently needed first. The needed
// pages that find no room are spread evenly over the walk: each is moved while the ones between are computed.
#pragma once

#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include "backend.h"

namespace qlora::pager {

constexpr std::int64_t kUnlimited = std::numeric_limits<std::int64_t>::max();

struct TierRoom {
  Tier tier;
  std::int64_t pages;  // kUnlimited: all
  std::int64_t ring;   // of these, what pages of lower tiers pass through, if there are such pages
};

struct Candidate {
  int level;                // of its home, counted from the compute tier; -1: it has none yet
  std::int64_t position;    // in the walk; -1: not needed
  std::uint64_t last_need;  // the number of the last walk that needed it
};

// The level of each page's home among the tiers from the compute tier down, the last of which takes all that is left.
// Pages in the order of their positions; a page without home that is not needed gets none (-1).
std::vector<int> choose_levels(std::span<const Candidate> pages, std::span<const TierRoom> tiers);

}  // namespace qlora::pager
