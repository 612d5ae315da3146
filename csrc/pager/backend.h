// What the pager asks of a machine: memory of its tiers, and moves of pages between them that run beside the compute.
//
// Work may be asynchronous: it is ordered by tokens; moves of one page into the compute tier are done in order besides.
// Where the host computes, several threads move pages at the same time. Two machines exist: backend_host.h and
// backend_cuda.h.
#pragma once

#include <cstddef>
#include <cstdint>

namespace qlora::pager {

// From the fastest to the largest. None: a page of zeros that has never been written and takes no memory.
enum class Tier : int { None, Device, Host, File };

constexpr int kNumTiers = 4;

struct Place {
  Tier tier = Tier::None;
  std::byte* memory = nullptr;  // of Device and Host
  std::int64_t offset = 0;      // of File, in bytes
};

// Stands for work given to a backend; 0 for work that is done.
using Token = std::uint64_t;

class Backend {
 public:
  explicit Backend(std::int64_t page_bytes) : page_bytes_(page_bytes) {}
  virtual ~Backend() = default;

  // The size of a page.
  std::int64_t page_bytes() const { return page_bytes_; }

  // The tier that pages are computed in; and of `room` pages there, how many are kept for those of lower tiers, which
  // are moved in, computed and moved out.
  virtual Tier compute_tier() const = 0;
  virtual std::int64_t ring_pages(std::int64_t room) const = 0;

  // How many pages of Host it takes to move pages between File and another compute tier.
  virtual int staging_pages() const { return 0; }

  // Memory for a page in Device or Host; zeros if it is the compute tier. The tier may have `room` more of these pages,
  // at least this one. release: once all work with it is done; does not throw.
  virtual std::byte* allocate(Tier tier, std::int64_t room) = 0;
  virtual void release(Tier tier, std::byte* memory) = 0;

  // Copies a page from one tier to another, or zeros if from is None, when both tokens' work is done.
  virtual Token move(const Place& from, const Place& to, Token after_source, Token after_target) = 0;

  // What is computed from now on waits for that work.
  virtual void before_compute(Token token) = 0;
  // Stands for all that has been computed so far.
  virtual Token after_compute() = 0;

  // The caller waits. Throws what the work threw.
  virtual void wait(Token token) = 0;

  // Throws if a move has failed, or what was moved to File cannot all be there any more.
  virtual void check() const = 0;

  // Reserves room in File for pages up to this offset; throws if there is none. No page is moved to offset 0: the room
  // of the first is the file's own.
  virtual void reserve_file(std::int64_t bytes) = 0;

  // Whether this process is the one that may call all of the above: not a fork of it, where the file and the I/O thread
  // are the parent's.
  virtual bool usable() const = 0;

  // Between memory of the compute tier and ordinary memory, in the order of the compute; the caller may wait for it.
  virtual void read(const std::byte* page, std::byte* memory, std::int64_t bytes) = 0;
  virtual void write(const std::byte* memory, std::byte* page, std::int64_t bytes) = 0;

  // Whether the last move out of File had to wait for the disk.
  virtual bool waits_for_disk() const { return false; }

  // By the caller, for work that is asynchronous.
  virtual double seconds_waited() const { return 0; }

 private:
  std::int64_t page_bytes_;
};

}  // namespace qlora::pager
