// The file tier: room for pages in a file, by pread and pwrite. Never mapped: a mapping dies of SIGBUS when the file is
// truncated or the disk is full, where pread and pwrite return an error. The room of the first page is the header's, so
// that the others lie at multiples of their size, and a system that can caches them in large pieces.
#pragma once

#include <sys/stat.h>

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <string>

#include "own_file.h"

namespace qlora::pager {

// Errors are std::system_error with the path, what was expected and what was got. The file is deleted at the end if it
// is still the one that was opened; if it is deleted before, its space lives on until then. A fork has none of it.
class PageFile {
 public:
  // Makes the file, or takes over one that an earlier run left behind. std::invalid_argument if the file is not such a
  // one: what is in it is overwritten.
  explicit PageFile(const std::string& path);
  ~PageFile();
  PageFile(const PageFile&) = delete;
  PageFile& operator=(const PageFile&) = delete;

  // Makes room on the disk for this many bytes, those of the header included, if there is not.
  void reserve(std::int64_t bytes);

  // At this offset of the file, by any number of threads. Both check that the file has not been cut: a write behind its
  // end would make it as long again, and hide that.
  // read: whether it had to wait for the disk, as far as the system tells.
  bool read(std::int64_t offset, std::byte* memory, std::int64_t bytes) const;
  void write(std::int64_t offset, const std::byte* memory, std::int64_t bytes) const;

  // Throws if the file is, or was at an earlier check, shorter than what was reserved, or has holes.
  void check_whole() const;

 private:
  struct stat status() const;
  void check_whole_locked() const;
  [[noreturn]] void fail(const std::string& what, int error) const;

  std::string path_;
  OwnFile file_;
  std::int64_t reserved_ = 0;
  bool counts_blocks_ = false;  // whether what is reserved shows in the blocks of the file: not with compression
  mutable bool lost_ = false;
  mutable std::mutex mutex_;  // of these: a reserve may meet a move
};

}  // namespace qlora::pager
