// A pager on the host backend, whose pages count their own updates.
#pragma once

#include <unistd.h>

#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "../check.h"
#include "pager/backend_host.h"
#include "pager/pager.h"

namespace qlora::pager {

constexpr std::int64_t kPageBytes = 4096;
constexpr int kThreads = 3;

inline std::string file_name(const std::string& name) {
  return (std::filesystem::temp_directory_path() / ("qlora_test_host_pager_" + name + std::to_string(getpid())))
      .string();
}

inline std::unique_ptr<Pager> make_pager(const std::string& path, std::int64_t room) {
  auto backend = std::make_unique<HostBackend>(kPageBytes, path, kThreads);
  std::vector<TierRoom> tiers = {{Tier::Host, room, backend->ring_pages(room)}};
  if (!path.empty()) tiers.push_back({Tier::File, kUnlimited, 0});
  return std::make_unique<Pager>(std::move(backend), tiers);
}

// A walk of one thread: visit(position, memory) for each page.
inline void walk(Pager& pager, const std::vector<PageId>& pages, bool writes,
                 const std::function<void(std::size_t, std::byte*)>& visit) {
  pager.walk(pages, writes, [&](std::size_t position, std::span<std::byte* const> run) {
    for (std::byte* const memory : run) {
      if (memory != nullptr) {
        visit(position, memory);
      } else {
        CHECK(pager.pass(visit));
      }
      ++position;
    }
  });
}

inline void increment(Pager& pager, const std::vector<PageId>& pages) {
  walk(pager, pages, true, [](std::size_t, std::byte* memory) { ++*reinterpret_cast<std::int64_t*>(memory); });
}

// The count of each page; -1 if it cannot be had.
inline std::vector<std::int64_t> counts(Pager& pager, const std::vector<PageId>& pages) {
  std::vector<std::int64_t> counted(pages.size(), -1);
  walk(pager, pages, false, [&](std::size_t i, std::byte* at) { counted[i] = *reinterpret_cast<std::int64_t*>(at); });
  return counted;
}

}  // namespace qlora::pager
