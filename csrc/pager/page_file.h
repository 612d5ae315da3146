// The file tier: room for pages in a file, by pread and pwrite. Never mapped: a mapping dies of SIGBUS when the file is
// truncated or the disk is full, where pread and pwrite return an error.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace qlora::pager {

// Errors are std::system_error with the path, what was expected and what was got. The file is deleted at the end if it
// is still the one that was opened; if it is deleted before, its space lives on until then.
class PageFile {
 public:
  // Makes the file, or takes over one that an earlier run left behind. std::invalid_argument if the file is not such a
  // one: what is in it is overwritten.
  explicit PageFile(const std::string& path);
  ~PageFile();
  PageFile(const PageFile&) = delete;
  PageFile& operator=(const PageFile&) = delete;

  // Makes room on the disk for this many bytes of pages, if there is not.
  void reserve(std::int64_t bytes);

  // At offset bytes of the pages. Both check that the file is whole: a write behind its end would make it long enough
  // again, with zeros for what is lost.
  void read(std::int64_t offset, std::byte* memory, std::int64_t bytes) const;
  void write(std::int64_t offset, const std::byte* memory, std::int64_t bytes) const;

  // Throws if the file is shorter than what was reserved.
  void check_whole() const;

  // Closes without deleting: in a forked process.
  void abandon();

 private:
  [[noreturn]] void fail(const std::string& what, int error) const;

  std::string path_;
  int file_ = -1;
  std::int64_t reserved_ = 0;
};

}  // namespace qlora::pager
