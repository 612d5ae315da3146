// dropout_mask: the same bytes on every path and however it is cut, as many true ones as the probability says, and none
// that tells of another.
#include "cpu/dropout_mask.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "check.h"
#include "cpu/path.h"
#include "random.h"

using namespace qlora;

namespace {

constexpr std::int64_t kBlock = 256;

std::vector<std::uint8_t> draw(std::uint64_t key, double keep, std::int64_t n, std::int64_t blocks_each) {
  const auto kept_below = static_cast<std::uint32_t>(keep * 0x1p32);
  constexpr std::uint8_t kUntouched = 7;
  std::vector<std::uint8_t> kept(static_cast<std::size_t>(n + kBlock), kUntouched);
  const std::int64_t blocks = (n + kBlock - 1) / kBlock;
  for (std::int64_t begin = 0; begin < blocks; begin += blocks_each) {
    const std::int64_t end = std::min(begin + blocks_each, blocks);
    cpu::dropout_mask(key, kept_below, n, begin, end, reinterpret_cast<bool*>(kept.data()));
  }
  CHECK(std::all_of(kept.begin() + n, kept.end(), [](std::uint8_t x) { return x == kUntouched; }));
  kept.resize(static_cast<std::size_t>(n));
  return kept;
}

void check_bytes() {
  for (const std::int64_t n : {0, 1, 255, 256, 257, 1000, 5000}) {
    for (const double keep : {0.0, 0.05, 0.5, 0.9, 1.0 - 0x1p-32}) {
      cpu::set_path("portable");
      const auto expected = draw(3, keep, n, 1);
      for (const auto& path : cpu::path_names()) {
        cpu::set_path(path);
        for (const std::int64_t blocks_each : {1, 3, 100}) CHECK(draw(3, keep, n, blocks_each) == expected);
      }
      const auto kept = std::count(expected.begin(), expected.end(), 1);
      CHECK(kept + std::count(expected.begin(), expected.end(), 0) == n);
      if (keep == 0.0) CHECK(kept == 0);
      if (keep == 1.0 - 0x1p-32) CHECK(kept == n);
    }
  }
}

// A number that is the bound itself is not kept, and the one below it is.
void check_bound() {
  for (const std::int64_t i : {0, 77, 255, 256, 300, 599}) {
    const std::uint32_t number = random32(random_block_key(3, i / kBlock), static_cast<std::uint32_t>(i % kBlock));
    for (const auto& path : cpu::path_names()) {
      cpu::set_path(path);
      for (const bool kept : {false, true}) {
        std::uint8_t mask[600];
        cpu::dropout_mask(3, number + kept, 600, 0, 3, reinterpret_cast<bool*>(mask));
        CHECK_EQ(mask[i] == 1, kept);
      }
    }
  }
}

// Within five standard deviations.
void check_share(std::int64_t count, std::int64_t of, double expected) {
  const double deviation = std::sqrt(static_cast<double>(of) * expected * (1 - expected));
  CHECK(std::fabs(static_cast<double>(count) - static_cast<double>(of) * expected) < 5 * deviation);
}

void check_randomness() {
  const auto rare = draw(1, 0x1p-18, 1 << 22, 1 << 20);  // by the lower bits, too
  check_share(std::count(rare.begin(), rare.end(), 1), 1 << 22, 0x1p-18);
  CHECK(std::count(rare.begin(), rare.end(), 1) > 0);
  constexpr std::int64_t kCount = 1 << 20;
  for (const double keep : {0.001, 0.1, 0.5, 0.95}) {
    const auto kept = draw(1, keep, kCount, 1 << 20), other = draw(2, keep, kCount, 1 << 20);
    check_share(std::count(kept.begin(), kept.end(), 1), kCount, keep);
    // Kept together: an element and one further on, of a row of 576 or 4096 before it, or of another key.
    for (const std::int64_t distance : {1, 2, 3, 16, 255, 256, 257, 576, 4096}) {
      std::int64_t both = 0;
      for (std::int64_t i = distance; i < kCount; ++i) {
        both += kept[static_cast<std::size_t>(i)] & kept[static_cast<std::size_t>(i - distance)];
      }
      check_share(both, kCount - distance, keep * keep);
    }
    std::int64_t both = 0;
    for (std::size_t i = 0; i < kept.size(); ++i) both += kept[i] & other[i];
    check_share(both, kCount, keep * keep);
    // Each place of a block: no counter is favoured.
    for (std::int64_t place = 0; place < kBlock; ++place) {
      std::int64_t here = 0;
      for (std::int64_t i = place; i < kCount; i += kBlock) here += kept[static_cast<std::size_t>(i)];
      check_share(here, kCount / kBlock, keep);
    }
  }
}

}  // namespace

int main() {
  check_bytes();
  check_bound();
  check_randomness();
  return failures();
}
