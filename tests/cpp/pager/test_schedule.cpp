// The schedule, in virtual time: what moves, when it is asked for, what is overlapped, and that nothing clashes.
#include <algorithm>
#include <cstdint>
#include <memory>
#include <numeric>
#include <random>

#include "simulated_backend.h"

using namespace qlora::pager;

namespace {

constexpr std::int64_t kPageBytes = 4096;

// A pager over simulated tiers, whose pages count their own updates.
class Run {
 public:
  Run(Costs costs, std::vector<TierRoom> tiers) {
    auto made = std::make_unique<SimulatedBackend>(kPageBytes, costs, trace);
    backend_ = made.get();
    pager = std::make_unique<Pager>(std::move(made), std::move(tiers));
  }

  void add(std::int64_t count) {
    for (const PageId page : pager->add(count)) {
      pages.push_back(page);
      updates_[page] = 0;
    }
  }

  void remove(std::size_t index) {
    pager->remove(pages[index]);
    pages.erase(pages.begin() + static_cast<std::ptrdiff_t>(index));
  }

  void walk(const std::vector<PageId>& order, bool writes = true) {
    pager->walk(order, writes, [&](std::size_t position, std::span<std::byte* const> memories) {
      for (std::byte* const memory : memories) {
        const PageId page = order[position++];
        auto& count = *reinterpret_cast<std::int64_t*>(memory);
        CHECK_EQ(count, updates_[page]);
        backend_->compute(memory);
        if (writes) count = ++updates_[page];
      }
    });
    if (!writes) trace.now = std::max(trace.now, trace.compute_free);  // who reads waits for it
  }

  void clear() {
    trace.moves.clear();
    trace.late = trace.waited = trace.computed = 0;
  }

  SimulatedBackend::Trace trace;
  std::unique_ptr<Pager> pager;
  std::vector<PageId> pages;

 private:
  SimulatedBackend* backend_;
  std::map<PageId, std::int64_t> updates_;
};

std::vector<TierRoom> device_tiers(std::int64_t device, std::int64_t host, std::int64_t ring = 3) {
  return {{Tier::Device, device, ring}, {Tier::Host, host, 0}, {Tier::File, kUnlimited, 0}};
}

// What a slot of the ring holds is known also where the move into it failed.
void after_a_failed_move_pages_are_what_they_were() {
  for (std::int64_t failing = 0; failing < 12; ++failing) {
    Run run({1, 1, 1}, device_tiers(4, 3));
    run.add(9);
    for (std::ptrdiff_t count = 9; count > 0; --count) {  // no two have been updated as often
      run.walk({run.pages.begin(), run.pages.begin() + count});
    }
    const std::vector<PageId> reversed(run.pages.rbegin(), run.pages.rend());
    run.trace.failing = failing;
    bool failed = false;
    try {
      run.walk(reversed, false);
    } catch (const std::runtime_error&) {
      failed = true;
    }
    run.trace.failing = -1;
    if (failing == 0) CHECK(failed);
    run.walk(reversed, false);
    run.walk(run.pages);
    run.walk(run.pages);
  }
}

void nothing_moves_when_all_fits() {
  Run run({1, 5, 5}, device_tiers(8, 100));
  run.add(8);
  for (int step = 0; step < 3; ++step) run.walk(run.pages);
  CHECK(run.trace.moves.empty());
  CHECK_EQ(run.trace.waited, 0);
  CHECK_EQ(run.trace.end(), 3 * 8);
  CHECK_EQ(run.trace.most[Tier::Device], 8);
  CHECK_EQ(run.pager->stats().hits, 24);
}

// For a new page those leave that no walk has come to for the longest time, wherever they are in the order of pages.
void the_least_recently_walked_leave() {
  Run run({1, 1, 1}, device_tiers(6, 100, 2));
  run.add(7);
  const std::vector<PageId> first(run.pages.begin(), run.pages.begin() + 3);
  const std::vector<PageId> later(run.pages.begin() + 3, run.pages.begin() + 6);
  for (const auto& [before, last] : {std::pair{first, later}, {later, first}}) {
    run.walk(before);
    run.walk(last);
    run.walk({run.pages.back()});
    run.clear();
    run.walk(last);
    CHECK(run.trace.moves.empty());
  }
}

// A step takes as long as the busiest engine, besides a page at each end, for any part of the pages that fits.
void engines_overlap(Costs costs, std::int64_t budget, std::int64_t count) {
  const auto tiers = device_tiers(budget, 1000);
  const std::int64_t ring = tiers[0].ring;
  Run run(costs, tiers);
  run.add(count);
  for (int step = 0; step < 2; ++step) run.walk(run.pages);
  run.clear();
  const double begin = run.trace.end();
  constexpr int kSteps = 4;
  for (int step = 0; step < kSteps; ++step) run.walk(run.pages);
  const auto streamed = static_cast<double>(count - std::max<std::int64_t>(0, budget - ring));
  const double busiest = std::max(static_cast<double>(count) * costs.compute, streamed * std::max(costs.in, costs.out));
  const double taken = run.trace.end() - begin;
  CHECK(taken >= kSteps * busiest - 1e-6);
  CHECK(taken <= kSteps * (busiest + costs.compute + costs.in + costs.out));
  // Each move was asked for as soon as its memory was free, and what the compute waited for is the engines' own time.
  CHECK_EQ(run.trace.late, 0);
  // Each page that streams comes and goes once a step.
  CHECK_EQ(std::ssize(run.trace.moves), static_cast<std::int64_t>(2 * kSteps * streamed));
  CHECK(run.trace.most[Tier::Device] <= std::max(budget, ring));
}

// The other walks that a pager lives through: its pages come and go, walks are over parts, in other orders, read only.
void random_walks(unsigned seed, const std::vector<TierRoom>& tiers, Costs costs) {
  std::mt19937 random(seed);
  Run run(costs, tiers);
  run.add(1 + random() % 20);
  for (int i = 0; i < 60; ++i) {
    if (random() % 3 == 0) run.add(random() % 8);
    while (random() % 5 < 2 && !run.pages.empty()) run.remove(random() % run.pages.size());
    std::vector<PageId> order = run.pages;
    if (random() % 3 == 0) std::shuffle(order.begin(), order.end(), random);
    if (random() % 3 == 0) order.resize(order.size() - random() % (order.size() + 1));
    if (random() % 3 == 0)
      order.erase(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(random() % (order.size() + 1)));
    run.walk(order, random() % 4 != 0);
    CHECK(run.trace.most[tiers[0].tier] <= std::max(tiers[0].pages, tiers[0].ring));
    CHECK(run.trace.most[Tier::Host] <= tiers[1].pages);
  }
  if (seed % 2 == 0) {  // else it ends with pages in it
    while (!run.pages.empty()) run.remove(run.pages.size() - 1);
    CHECK_EQ(run.pager->count(), 0);
    std::int64_t at_home = 0;
    for (const std::int64_t pages : run.pager->stats().pages) at_home += pages;
    CHECK_EQ(at_home, 0);
  }
  run.pager.reset();
  for (const auto& [tier, pages] : run.trace.allocated) CHECK_EQ(pages, 0);
}

// Pages that change places over three tiers leave a tier before others come.
void no_tier_holds_more_than_its_room() {
  Run run({1, 1, 1}, device_tiers(100, 100));
  run.add(300);
  const auto part = [&](std::ptrdiff_t begin, std::ptrdiff_t end) {
    return std::vector<PageId>(run.pages.begin() + begin, run.pages.begin() + end);
  };
  std::vector<PageId> last = part(200, 300);
  std::ranges::reverse(last);
  for (const auto& order : {run.pages, last, part(0, 100), last, part(100, 200), run.pages}) run.walk(order);
  run.add(97);
  run.walk({run.pages.end() - 97, run.pages.end()});
  run.walk(run.pages);
  CHECK_EQ(run.trace.most[Tier::Device], 100);
  CHECK_EQ(run.trace.most[Tier::Host], 100);
}

// A walk that has visited nothing has changed nothing, and has taken no memory for good.
void a_walk_that_fails_before_its_first_visit_may_be_repeated() {
  for (std::int64_t failing = 0; failing < 3; ++failing) {  // each of the pages that have to leave the device
    Run run({1, 1, 1}, device_tiers(4, 3));
    run.add(4);
    run.walk(run.pages);
    run.add(5);
    run.trace.failing = failing;
    CHECK_EQ(error_of([&] { run.walk(run.pages); }), "a move fails");
    CHECK_EQ(run.pager->stats().visits, 4);
    run.trace.failing = -1;
    for (int i = 0; i < 2; ++i) run.walk(run.pages);
    run.pager.reset();
    for (const auto& [tier, pages] : run.trace.allocated) CHECK_EQ(pages, 0);
  }
}

void no_room_is_an_error() {
  Run run({1, 1, 1}, {{Tier::Device, 4, 2}});
  run.add(4);
  CHECK_EQ(error_of([&] { run.pager->add(1); }), "expected room for 5 pages of 4096 bytes, got room for 4");
  CHECK_EQ(run.pager->count(), 4);
  run.walk(run.pages);
}

}  // namespace

int main() {
  after_a_failed_move_pages_are_what_they_were();
  nothing_moves_when_all_fits();
  the_least_recently_walked_leave();
  for (const double in : {0.3, 1.0, 4.0}) {
    for (const double out : {0.3, 1.0, 4.0}) {
      for (const std::int64_t budget : {0, 3, 10, 20, 30, 39}) engines_overlap({1.0, in, out}, budget, 40);
    }
  }
  for (unsigned seed = 0; seed < 200; ++seed) {
    const auto room = static_cast<std::int64_t>(seed % 11);
    random_walks(seed, device_tiers(room, static_cast<std::int64_t>(seed % 4)), {1, 0.7, 2});
    random_walks(seed, device_tiers(room, 1 + seed % 7, 1 + seed % 4), {1, 0.5 + seed % 3, 0.5 + seed / 3 % 3});
  }
  no_tier_holds_more_than_its_room();
  a_walk_that_fails_before_its_first_visit_may_be_repeated();
  no_room_is_an_error();
  return failures();
}
