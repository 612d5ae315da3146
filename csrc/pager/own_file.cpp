#include "own_file.h"

#include <fcntl.h>
#include <pthread.h>
#include <unistd.h>

#include <mutex>
#include <set>

namespace qlora::pager {

// Those that are open. No fork comes between a file's opening and its entry here.
struct OwnFile::All {
  std::mutex mutex;
  std::set<OwnFile*> files;

  static All& get() {
    static All& all = *new All;  // never destroyed: a process may fork while it ends
    [[maybe_unused]] static const int registered =
        ::pthread_atfork([] { all.mutex.lock(); }, [] { all.mutex.unlock(); },
                         [] {
                           for (OwnFile* file : all.files) {
                             ::close(file->descriptor_);
                             file->descriptor_ = -1;
                           }
                           all.mutex.unlock();
                         });
    return all;
  }
};

OwnFile::OwnFile(const std::string& path, int flags, unsigned mode) {
  All& all = All::get();
  const std::lock_guard lock(all.mutex);
  descriptor_ = ::open(path.c_str(), flags | O_CLOEXEC, mode);
  if (descriptor_ >= 0) all.files.insert(this);
}

OwnFile::~OwnFile() {
  All& all = All::get();
  const std::lock_guard lock(all.mutex);
  all.files.erase(this);
  if (descriptor_ >= 0) ::close(descriptor_);
}

}  // namespace qlora::pager
