// Pages in the memory of a CUDA device, in pinned memory of the host and in a file. Two streams copy, one in and one
// out, beside the one that computes; events order them, and nothing waits for the whole device.
//
// The memory is never managed: a page moves when the schedule says so, not when it is touched.
#pragma once

#include <cuda_runtime_api.h>

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "backend.h"
#include "io_thread.h"
#include "page_file.h"
#include "pinned_pages_cuda.h"

namespace qlora::pager {

// What it takes from its user, who knows torch.
struct CudaHooks {
  std::function<std::byte*(std::int64_t bytes)> allocate_device;
  std::function<void(std::byte*)> release_device;
  std::function<cudaStream_t()> compute_stream;  // the current one
  std::function<int(int device)> enter_device;   // makes it the thread's current one; returns the one before
  std::function<void(int device)> return_to;     // unless that would open a device that no one uses
  std::function<void(const std::string&)> warn;
};

class CudaBackend final : public Backend {
 public:
  // An empty page_file: no file.
  CudaBackend(std::int64_t page_bytes, int device, const std::string& page_file, CudaHooks hooks);
  ~CudaBackend() override;

  Tier compute_tier() const override { return Tier::Device; }
  std::int64_t ring_pages(std::int64_t) const override { return 3; }  // in, computed, out
  int staging_pages() const override { return kStaging; }
  std::byte* allocate(Tier tier, std::int64_t room) override;
  void release(Tier tier, std::byte* memory) override;
  Token move(const Place& from, const Place& to, Token after_source, Token after_target) override;
  void before_compute(Token token) override;
  Token after_compute() override;
  void wait(Token token) override;
  void check() const override;
  void reserve_file(std::int64_t bytes) override { file_->reserve(bytes); }
  bool usable() const override { return io_.in_own_process(); }  // a fork cannot use CUDA
  void read(const std::byte* page, std::byte* memory, std::int64_t bytes) override;
  void write(const std::byte* memory, std::byte* page, std::int64_t bytes) override;
  double seconds_waited() const override { return io_.seconds_waited(); }

 private:
  static constexpr int kStaging = 2;     // file pages on their way, in pinned memory
  static constexpr Token kRecent = 512;  // tokens older than so many are of work that is done

  // What a token stands for: a job of the I/O thread, if there is one, and what its event was recorded after.
  struct Work {
    std::uint64_t job = 0;
    cudaEvent_t event = nullptr;
  };
  struct Staging {
    std::byte* memory = nullptr;
    cudaEvent_t copied = nullptr;  // what was read into it last
  };

  Token new_token();
  const Work* work(Token token) const;  // null: it is done
  void stream_waits(cudaStream_t stream, Token token);
  void move_with_file(const Place& from, const Place& to, const Work* after_source, const Work* after_target,
                      cudaEvent_t done);

  int device_;
  CudaHooks hooks_;
  std::optional<PageFile> file_;
  cudaStream_t in_ = nullptr, out_ = nullptr;
  std::vector<Work> recent_;
  Token last_ = 0;
  PinnedPages pinned_;
  Staging staging_[kStaging];
  unsigned turn_ = 0;  // of staging_; the I/O thread's
  IoThread io_;        // last: its jobs use all of the above
};

}  // namespace qlora::pager
