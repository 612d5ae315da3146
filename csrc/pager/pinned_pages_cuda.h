// Pages in pinned memory of the host, many to an allocation: each of those is a call to the driver and a mapping of its
// own, of which the system lets a process have 65,530. Pages of 1 MiB would come to that with 64 GiB.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <iterator>
#include <map>
#include <string>
#include <utility>
#include <vector>

namespace qlora::pager {

class PinnedPages {
 public:
  // warn: told once if memory cannot be pinned and is pageable instead.
  PinnedPages(std::int64_t page_bytes, std::function<void(const std::string&)> warn)
      : page_bytes_(page_bytes), warn_(std::move(warn)) {}

  // Takes at most `room` pages from the system, of which later ones come.
  // Throws std::runtime_error if there is no memory.
  std::byte* allocate(std::int64_t room);
  void release(std::byte* page);

 private:
  struct Block {
    std::int64_t pages = 0, used = 0;
    bool pinned = true;
  };
  using Blocks = std::map<std::byte*, Block>;  // by their first page

  bool add_pinned(std::int64_t pages);
  void add(std::byte* memory, Block block);
  Blocks::iterator block_of(std::byte* page) { return std::prev(blocks_.upper_bound(page)); }

  std::int64_t page_bytes_;
  std::function<void(const std::string&)> warn_;
  bool warned_ = false;
  std::int64_t pages_ = 0;
  Blocks blocks_;
  std::vector<std::byte*> unused_;
};

}  // namespace qlora::pager
