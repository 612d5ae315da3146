#include "state_layout.h"

#include <algorithm>

#include "../adamw.h"

namespace qlora::pager {
namespace {

std::int64_t aligned(std::int64_t bytes) { return ceil_div(bytes, 64) * 64; }

std::int64_t part_bytes(Part part, std::int64_t count, int bits) {
  if (bits == 32 && part >= Part::ExpAvgAbsmax) return 0;
  return aligned(ceil_div(count, part_block(part)) * part_itemsize(part, bits));
}

std::int64_t segment_bytes(std::int64_t count, int bits) {
  std::int64_t bytes = 0;
  for (int part = 0; part < kNumParts; ++part) bytes += part_bytes(static_cast<Part>(part), count, bits);
  return bytes;
}

// The most elements of `count` that fit, in whole blocks unless it is all of them.
std::int64_t fitting(std::int64_t count, int bits, std::int64_t bytes) {
  if (segment_bytes(count, bits) <= bytes) return count;
  std::int64_t blocks = std::min(count / kAdamwBlock, bytes / (2 * kAdamwBlock * part_itemsize(Part::ExpAvg, bits)));
  while (blocks > 0 && segment_bytes(blocks * kAdamwBlock, bits) > bytes) --blocks;
  return blocks * kAdamwBlock;
}

}  // namespace

std::int64_t part_itemsize(Part part, int bits) { return part >= Part::ExpAvgAbsmax || bits == 32 ? 4 : 1; }

std::int64_t part_block(Part part) { return part >= Part::ExpAvgAbsmax ? kAdamwBlock : 1; }

std::vector<Segment> cut(std::int64_t numel, int bits, std::int64_t page_bytes, std::int64_t next_page, Tail& tail) {
  std::vector<Segment> segments;
  for (std::int64_t first = 0; first < numel;) {
    const std::int64_t room = tail.page < 0 ? 0 : page_bytes - tail.used;
    const std::int64_t count = fitting(numel - first, bits, room);
    if (count == 0) {
      tail = {next_page++, 0};
      continue;
    }
    Segment segment{tail.page, first, count, {}};
    for (int part = 0; part < kNumParts; ++part) {
      const std::int64_t bytes = part_bytes(static_cast<Part>(part), count, bits);
      segment.at[part] = bytes == 0 ? -1 : tail.used;
      tail.used += bytes;
    }
    segments.push_back(segment);
    first += count;
  }
  return segments;
}

}  // namespace qlora::pager
