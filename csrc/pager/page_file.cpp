#include "page_file.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <stdexcept>
#include <string_view>
#include <system_error>

namespace qlora::pager {
namespace {

constexpr std::string_view kMagic = "qlora_ext page file: scratch space of a running optimizer\n";
constexpr std::int64_t kReservedAtOnce = 1 << 26;  // a signal may undo what is being reserved

std::int64_t allocated(const struct stat& status) { return std::int64_t{status.st_blocks} * 512; }

}  // namespace

PageFile::PageFile(const std::string& path) : path_(path), file_(path, O_RDWR | O_CREAT, 0600) {
  const int file = file_.descriptor();
  if (file < 0) fail("open", errno);
  char start[kMagic.size()];
  const ssize_t length = ::pread(file, start, sizeof start, 0);
  if (length < 0) fail("read", errno);
  if (length > 0 && std::string_view(start, static_cast<std::size_t>(length)) != kMagic) {
    throw std::invalid_argument(
        "PagedAdamW: page_file: expected a new file or one that an optimizer left behind, got '" + path +
        "' with other content");
  }
  if (::flock(file, LOCK_EX | LOCK_NB) != 0)
    fail("lock (another optimizer pages to it, here or in another process: release() that, or give this one its own)",
         errno);
  if (::ftruncate(file, 0) != 0) fail("truncate", errno);
  const ssize_t written = ::pwrite(file, kMagic.data(), kMagic.size(), 0);
  if (written != static_cast<ssize_t>(kMagic.size())) fail("write", written < 0 ? errno : ENOSPC);
  reserved_ = written;
}

PageFile::~PageFile() {
  const int file = file_.descriptor();
  if (file < 0) return;  // a fork
  struct stat mine, there;
  if (::fstat(file, &mine) == 0 && ::stat(path_.c_str(), &there) == 0 && mine.st_ino == there.st_ino &&
      mine.st_dev == there.st_dev) {
    ::unlink(path_.c_str());
  }
}

void PageFile::reserve(std::int64_t bytes) {
  const std::lock_guard lock(mutex_);
  if (bytes <= reserved_) return;
  check_whole_locked();
  // Not what is there already: where the filesystem cannot reserve, the C library writes zeros instead.
  const std::int64_t begin = reserved_;
  for (std::int64_t at = begin; at < bytes;) {
    const std::int64_t length = std::min(kReservedAtOnce, bytes - at);
    const int error = ::posix_fallocate(file_.descriptor(), at, length);
    if (error == EINTR) continue;
    if (error != 0) {
      // What was reserved before a full disk said no.
      if (::ftruncate(file_.descriptor(), begin) != 0) fail("truncate", errno);
      fail("reserve " + std::to_string(bytes) + " bytes", error);
    }
    at += length;
  }
  reserved_ = bytes;
  counts_blocks_ = allocated(status()) >= bytes;
}

struct stat PageFile::status() const {
  struct stat status;
  if (::fstat(file_.descriptor(), &status) != 0) fail("stat", errno);
  return status;
}

void PageFile::check_whole() const {
  const std::lock_guard lock(mutex_);
  check_whole_locked();
}

void PageFile::check_whole_locked() const {
  const struct stat status = this->status();
  if (status.st_size < reserved_ || (counts_blocks_ && allocated(status) < reserved_)) lost_ = true;
  if (lost_) {
    fail("expected " + std::to_string(reserved_) + " bytes, got " + std::to_string(status.st_size) + " and " +
             std::to_string(allocated(status)) + " on the disk (truncated by someone else; the states in it are lost)",
         EIO);
  }
}

bool PageFile::read(std::int64_t offset, std::byte* memory, std::int64_t bytes) const {
  check_whole();
  const iovec all{memory, static_cast<std::size_t>(bytes)};
  const ssize_t in_memory = ::preadv2(file_.descriptor(), &all, 1, offset, RWF_NOWAIT);
  const bool waits = in_memory < bytes && (in_memory >= 0 || errno == EAGAIN);
  for (std::int64_t done = std::max<ssize_t>(in_memory, 0); done < bytes;) {
    const ssize_t length =
        ::pread(file_.descriptor(), memory + done, static_cast<std::size_t>(bytes - done), offset + done);
    if (length < 0 && errno == EINTR) continue;
    if (length < 0) fail("read", errno);
    if (length == 0) {
      check_whole();  // which it was a moment ago
      fail("read at " + std::to_string(offset) + ": expected " + std::to_string(bytes) + " bytes, got " +
               std::to_string(done),
           EIO);
    }
    done += length;
  }
  return waits;
}

void PageFile::write(std::int64_t offset, const std::byte* memory, std::int64_t bytes) const {
  check_whole();
  for (std::int64_t done = 0; done < bytes;) {
    const ssize_t length =
        ::pwrite(file_.descriptor(), memory + done, static_cast<std::size_t>(bytes - done), offset + done);
    if (length < 0 && errno == EINTR) continue;
    if (length <= 0) fail("write", length < 0 ? errno : ENOSPC);
    done += length;
  }
}

void PageFile::fail(const std::string& what, int error) const {
  throw std::system_error(error, std::generic_category(), "page_file '" + path_ + "': " + what);
}

}  // namespace qlora::pager
