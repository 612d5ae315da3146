// What choose_levels and cut promise, over many cases.
#include <algorithm>
#include <map>
#include <random>

#include "../check.h"
#include "pager/residency.h"
#include "pager/state_layout.h"

using namespace qlora::pager;

namespace {

// Segments cover each parameter in order, from multiples of 256, and no two share a byte.
void check_cut() {
  std::mt19937 random(1);
  for (const std::int64_t page_bytes : {4096, 8192, 65536}) {
    Tail tail;
    std::int64_t next = 0;
    std::map<std::int64_t, std::int64_t> used;  // bytes by page
    for (int i = 0; i < 500; ++i) {
      const std::int64_t numel = random() % 3 == 0 ? static_cast<std::int64_t>(random() % 40000) : random() % 700;
      const int bits = random() % 2 == 0 ? 8 : 32;
      std::int64_t first = 0;
      for (const Segment& segment : cut(numel, bits, page_bytes, next, tail)) {
        CHECK_EQ(segment.first, first);
        CHECK(segment.first % 256 == 0 && segment.count > 0);
        CHECK(segment.count % 256 == 0 || segment.first + segment.count == numel);
        for (int part = 0; part < kNumParts; ++part) {
          const std::int64_t at = segment.at[part];
          const std::int64_t block = part_block(static_cast<Part>(part));
          CHECK_EQ(at < 0, bits == 32 && part >= 2);
          if (at < 0) continue;
          CHECK(at % 64 == 0 && at >= used[segment.page]);
          used[segment.page] = at + (segment.count + block - 1) / block * part_itemsize(static_cast<Part>(part), bits);
        }
        CHECK(used[segment.page] <= page_bytes);
        first += segment.count;
        next = std::max(next, segment.page + 1);
      }
      CHECK_EQ(first, numel);
    }
    CHECK_EQ(static_cast<std::int64_t>(used.size()), next);
    std::int64_t total = 0;
    for (const auto& [page, bytes] : used) total += bytes;
    CHECK(static_cast<double>(total) > 0.85 * static_cast<double>(next * page_bytes));  // pages are full
  }
}

std::vector<Candidate> walk_over(std::int64_t needed, const std::vector<int>& levels) {
  std::vector<Candidate> pages;
  for (std::size_t i = 0; i < levels.size(); ++i) {
    const auto position = static_cast<std::int64_t>(i);
    pages.push_back({levels[i], position < needed ? position : -1, static_cast<std::uint64_t>(i)});
  }
  return pages;
}

void check_levels() {
  const std::vector<TierRoom> two = {{Tier::Host, 6, 2}, {Tier::File, 1000, 0}};
  // All fit: all are at home above.
  CHECK(choose_levels(walk_over(6, std::vector<int>(6, -1)), two) == std::vector<int>(6, 0));
  // Else a ring is left free, and those below are spread evenly.
  const std::vector<int> expected = {1, 1, 0, 1, 1, 0, 1, 1, 0, 1, 1, 0};
  CHECK(choose_levels(walk_over(12, std::vector<int>(12, -1)), two) == expected);
  // The next walk changes nothing.
  CHECK(choose_levels(walk_over(12, expected), two) == expected);
  // What is not needed leaves, the least recently needed (here the first) first; it stays where there is room.
  CHECK(choose_levels(walk_over(1, {1, 0, 0, 0, 0, 1, 1, 1}), two) == (std::vector<int>{0, 1, 0, 0, 0, 1, 1, 1}));
  // A page without home that is not needed gets none.
  CHECK(choose_levels(walk_over(1, {-1, -1}), two) == (std::vector<int>{0, -1}));
  // A tier that is smaller than its ring is the ring.
  CHECK(choose_levels(walk_over(3, {-1, -1, -1}), std::vector<TierRoom>{{Tier::Host, 1, 2}, {Tier::File, 9, 0}}) ==
        (std::vector<int>{1, 1, 1}));
  // Three tiers: what leaves the first has its home in the second as long as there is room.
  const std::vector<TierRoom> three = {{Tier::Device, 4, 3}, {Tier::Host, 3, 2}, {Tier::File, 1000, 0}};
  CHECK(choose_levels(walk_over(4, {0, 0, 0, 0, -1}), three) == (std::vector<int>{0, 0, 0, 0, -1}));
  const std::vector<int> tight = choose_levels(walk_over(5, {0, 0, 0, 0, -1}), three);
  CHECK_EQ(std::ranges::count(tight, 0), 1);
  CHECK_EQ(std::ranges::count(tight, 1), 1);
  CHECK_EQ(std::ranges::count(tight, 2), 3);
}

}  // namespace

int main() {
  check_cut();
  check_levels();
  return failures();
}
