// A file of this process alone: a fork closes it, where it would keep the file's lock and its space on the disk after
// the process is gone, killed for example while a DataLoader's workers live on.
#pragma once

#include <string>

namespace qlora::pager {

class OwnFile {
 public:
  OwnFile(const std::string& path, int flags, unsigned mode);
  ~OwnFile();
  OwnFile(const OwnFile&) = delete;
  OwnFile& operator=(const OwnFile&) = delete;

  // -1: it could not be opened, which errno tells then, or this process is a fork of the one that did.
  int descriptor() const { return descriptor_; }

 private:
  struct All;
  int descriptor_;
};

}  // namespace qlora::pager
