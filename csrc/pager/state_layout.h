// How the states of parameters are cut into pages: a page holds those of a run of parameters or of a slice of one.
#pragma once

#include <cstdint>
#include <vector>

namespace qlora::pager {

// The tensors that make up the state of a parameter. 32-bit states have the first two, as float; in 8 bits these are
// codes, and each has an absmax for every 256 elements.
enum class Part : int { ExpAvg, ExpAvgSq, ExpAvgAbsmax, ExpAvgSqAbsmax };
constexpr int kNumParts = 4;

// The states of elements [first, first + count) of a parameter; first is a multiple of 256.
struct Segment {
  std::int64_t page;
  std::int64_t first, count;
  std::int64_t at[kNumParts];  // where each Part begins in the page, on a 64-byte boundary; -1: there is none
};

// The end of what the pages hold.
struct Tail {
  std::int64_t page = -1;
  std::int64_t used = 0;  // bytes of it
};

// Bytes that an element of this Part takes in states of this width (32 or 8), and how many elements share one value.
std::int64_t part_itemsize(Part part, int bits);
std::int64_t part_block(Part part);

// The segments of a parameter, from the tail on, which is moved. Pages that it takes beyond tail.page are numbered
// next_page, next_page + 1, ...
std::vector<Segment> cut(std::int64_t numel, int bits, std::int64_t page_bytes, std::int64_t next_page, Tail& tail);

// What the sizes of pages are multiples of. One has room for 256 elements and more.
constexpr std::int64_t kMinPageBytes = 4096;

}  // namespace qlora::pager
