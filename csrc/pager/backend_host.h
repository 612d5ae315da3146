// Pages in the memory of the host, and a file for those that it does not hold: what the CPU computes on.
#pragma once

#include <algorithm>
#include <atomic>
#include <optional>
#include <string>

#include "backend.h"
#include "own_process.h"
#include "page_file.h"

namespace qlora::pager {

// All work is done when a call returns: there are no tokens but 0.
class HostBackend final : public Backend {
 public:
  // An empty name: no file. `threads`: that compute.
  HostBackend(std::int64_t page_bytes, const std::string& page_file, std::int64_t threads);

  Tier compute_tier() const override { return Tier::Host; }
  // One for each thread, but never much of the room: a page at home saves all its moves.
  std::int64_t ring_pages(std::int64_t room) const override {
    return std::max<std::int64_t>(2, std::min(threads_, room / 4));
  }
  std::byte* allocate(Tier tier, std::int64_t room) override;
  void release(Tier tier, std::byte* memory) override;
  Token move(const Place& from, const Place& to, Token after_source, Token after_target) override;
  void before_compute(Token) override {}
  Token after_compute() override { return 0; }
  void wait(Token) override {}
  void check() const override;
  void reserve_file(std::int64_t bytes) override;
  bool usable() const override { return !file_ || process_.here(); }
  void read(const std::byte* page, std::byte* memory, std::int64_t bytes) override;
  void write(const std::byte* memory, std::byte* page, std::int64_t bytes) override;
  bool waits_for_disk() const override { return waits_for_disk_; }

 private:
  std::optional<PageFile> file_;
  std::int64_t threads_;
  OwnProcess process_;
  std::atomic<bool> waits_for_disk_ = false;
};

}  // namespace qlora::pager
