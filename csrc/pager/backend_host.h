// Pages in the memory of the host, and a file for those that it does not hold: what the CPU computes on.
#pragma once

#include <functional>
#include <optional>
#include <string>

#include "backend.h"
#include "io_thread.h"
#include "page_file.h"

namespace qlora::pager {

class HostBackend final : public Backend {
 public:
  // An empty name: no file.
  explicit HostBackend(const std::string& page_file);
  ~HostBackend() override;

  Tier compute_tier() const override { return Tier::Host; }
  // The one thread writes a page and then reads the next into the same memory, while another is computed. A third page
  // makes up for moves that do not take the same time each.
  std::int64_t ring_pages(std::int64_t room) const override { return room < 3 ? 2 : 3; }
  std::byte* allocate(Tier tier, std::int64_t bytes, std::int64_t room) override;
  void release(Tier tier, std::byte* memory, std::int64_t bytes) override;
  Token move(const Place& from, const Place& to, std::int64_t bytes, Token after_source, Token after_target) override;
  void before_compute(Token token) override { io_.wait(token); }
  Token after_compute() override { return 0; }  // the caller computes
  void wait(Token token) override { io_.wait(token); }
  void check() const override;
  void reserve_file(std::int64_t bytes) override;
  bool usable() const override { return !file_ || io_.in_own_process(); }
  void read(const std::byte* page, std::byte* memory, std::int64_t bytes) override;
  void write(const std::byte* memory, std::byte* page, std::int64_t bytes) override;
  // The thread that moves pages helps with work of the caller while it has nothing to move: see IoThread.
  void help(const std::function<bool()>& part, const std::function<void()>& work) { io_.help(part, work); }
  double seconds_waited() const override { return io_.seconds_waited(); }

 private:
  std::optional<PageFile> file_;
  IoThread io_;  // after the file, so that its last job is done before the file is closed
};

}  // namespace qlora::pager
