#include "backend_host.h"

#include <cstring>

#include "host_memory.h"

namespace qlora::pager {

HostBackend::HostBackend(std::int64_t page_bytes, const std::string& page_file, std::int64_t threads)
    : Backend(page_bytes), threads_(threads) {
  if (!page_file.empty()) file_.emplace(page_file);
}

std::byte* HostBackend::allocate(Tier, std::int64_t) { return allocate_host(page_bytes()); }

void HostBackend::release(Tier, std::byte* memory) { release_host(memory, page_bytes()); }

Token HostBackend::move(const Place& from, const Place& to, Token, Token) {
  if (from.tier == Tier::None) {
    std::memset(to.memory, 0, static_cast<std::size_t>(page_bytes()));
  } else if (from.tier == Tier::File) {
    waits_for_disk_ = file_->read(from.offset, to.memory, page_bytes());
  } else {
    file_->write(to.offset, from.memory, page_bytes());
  }
  return 0;
}

void HostBackend::check() const {
  if (file_) file_->check_whole();
}

void HostBackend::reserve_file(std::int64_t bytes) { file_->reserve(bytes); }

void HostBackend::read(const std::byte* page, std::byte* memory, std::int64_t bytes) {
  std::memcpy(memory, page, static_cast<std::size_t>(bytes));
}

void HostBackend::write(const std::byte* memory, std::byte* page, std::int64_t bytes) {
  std::memcpy(page, memory, static_cast<std::size_t>(bytes));
}

}  // namespace qlora::pager
