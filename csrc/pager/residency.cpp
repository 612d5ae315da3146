#include "residency.h"

#include <algorithm>
#include <functional>

namespace qlora::pager {
namespace {

using Indices = std::vector<std::size_t>;

// `count` of them, evenly spread.
Indices spread(const Indices& from, std::size_t count) {
  if (count >= from.size()) return from;
  Indices chosen;
  for (std::size_t i = 0; i < from.size(); ++i) {
    if ((i + 1) * count / from.size() > i * count / from.size()) chosen.push_back(from[i]);
  }
  return chosen;
}

}  // namespace

std::vector<int> choose_levels(std::span<const Candidate> pages, std::span<const TierRoom> tiers) {
  std::vector<int> chosen(pages.size(), -1);
  Indices left;  // those that no level above has taken
  for (std::size_t i = 0; i < pages.size(); ++i) {
    if (pages[i].level >= 0 || pages[i].position >= 0) left.push_back(i);
  }
  for (int level = 0; level < static_cast<int>(tiers.size()); ++level) {
    const TierRoom& room = tiers[static_cast<std::size_t>(level)];
    const bool all = level + 1 == static_cast<int>(tiers.size()) || std::ssize(left) <= room.pages;
    const auto most =
        static_cast<std::size_t>(all ? std::ssize(left) : std::max<std::int64_t>(0, room.pages - room.ring));
    Indices stay, come, idle;
    for (const std::size_t i : left) {
      const bool here = pages[i].level >= 0 && pages[i].level <= level;  // above: evicted from there
      if (pages[i].position >= 0) {
        (here ? stay : come).push_back(i);
      } else if (here || all) {
        idle.push_back(i);
      }
    }
    const auto take = [&](const Indices& taken) {
      for (const std::size_t i : taken) chosen[i] = level;
      return taken.size();
    };
    std::size_t count = take(spread(stay, most));
    count += take(spread(come, most - count));
    std::ranges::stable_sort(idle, std::greater{}, [&](std::size_t i) { return pages[i].last_need; });
    idle.resize(std::min(idle.size(), most - count));
    take(idle);
    std::erase_if(left, [&](std::size_t i) { return chosen[i] >= 0; });
  }
  return chosen;
}

}  // namespace qlora::pager
