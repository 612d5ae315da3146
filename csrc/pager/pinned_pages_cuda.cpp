#include "pinned_pages_cuda.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <utility>

#include "host_memory.h"

namespace qlora::pager {
namespace {

constexpr std::int64_t kMostBytes = 64 << 20;  // of a block

}  // namespace

std::byte* PinnedPages::allocate(std::int64_t room) {
  if (unused_.empty()) {
    // An eighth of what there is, so that little is unused.
    const std::int64_t wanted = std::clamp<std::int64_t>(std::min(pages_ / 8, kMostBytes / page_bytes_), 1, room);
    if (!add_pinned(wanted) && (wanted == 1 || !add_pinned(1))) {
      add(allocate_host(page_bytes_), {.pages = 1, .pinned = false});
    }
  }
  std::byte* page = unused_.back();
  unused_.pop_back();
  ++block_of(page)->second.used;
  return page;
}

void PinnedPages::release(std::byte* page) {
  const auto at = block_of(page);
  unused_.push_back(page);
  auto& [first, block] = *at;
  if (--block.used > 0) return;
  std::erase_if(unused_, [&](std::byte* other) { return block_of(other) == at; });
  if (block.pinned) {
    cudaFreeHost(first);
  } else {
    release_host(first, page_bytes_);
  }
  pages_ -= block.pages;
  blocks_.erase(at);
}

bool PinnedPages::add_pinned(std::int64_t pages) {
  void* memory = nullptr;
  const cudaError_t error =
      cudaHostAlloc(&memory, static_cast<std::size_t>(pages * page_bytes_), cudaHostAllocPortable);
  if (error == cudaSuccess) {
    add(static_cast<std::byte*>(memory), {.pages = pages});
    return true;
  }
  cudaGetLastError();  // so that no one raises it once more
  if (pages == 1 && !std::exchange(warned_, true)) {
    warn_("PagedAdamW: expected " + std::to_string(page_bytes_) + " bytes of pinned host memory, got " +
          cudaGetErrorName(error) + ". Using pageable memory, which moves more slowly");
  }
  return false;
}

void PinnedPages::add(std::byte* memory, Block block) {
  blocks_[memory] = block;
  pages_ += block.pages;
  for (std::int64_t page = block.pages; page-- > 0;) unused_.push_back(memory + page * page_bytes_);
}

}  // namespace qlora::pager
