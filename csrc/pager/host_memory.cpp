#include "host_memory.h"

#include <sys/mman.h>

#include <stdexcept>
#include <string>

#include "../huge_pages.h"

namespace qlora::pager {

// Pages of the pager lie in huge pages: a walk over memory in 4 KiB pages waits for their addresses. Those that are
// multiples of a huge page begin at one; the system maps smaller ones side by side, where the kernel joins them.
std::byte* allocate_host(std::int64_t bytes) {
  const std::int64_t extra = bytes % kHugePage == 0 ? kHugePage : 0;
  void* mapped = ::mmap(nullptr, static_cast<std::size_t>(bytes + extra), PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) {
    // As torch words it, for those that try again with a smaller batch: accelerate looks for " out of memory.".
    throw std::runtime_error("PagedAdamW: out of memory. Tried to allocate " + std::to_string(bytes) +
                             " bytes for states");
  }
  auto* memory = static_cast<std::byte*>(mapped);
  if (extra != 0) {
    const auto before = -reinterpret_cast<std::intptr_t>(memory) & (kHugePage - 1);
    if (before != 0) ::munmap(memory, static_cast<std::size_t>(before));
    if (before != extra) ::munmap(memory + before + bytes, static_cast<std::size_t>(extra - before));
    memory += before;
  }
  advise_huge_pages(memory, static_cast<std::size_t>(bytes));
  return memory;
}

void release_host(std::byte* memory, std::int64_t bytes) { ::munmap(memory, static_cast<std::size_t>(bytes)); }

}  // namespace qlora::pager
