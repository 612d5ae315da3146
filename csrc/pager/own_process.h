// The process that made an optimizer. A fork of it has neither its threads nor a file of its own.
#pragma once

#include <unistd.h>

#include <stdexcept>

namespace qlora::pager {

class OwnProcess {
 public:
  bool here() const { return ::getpid() == made_in_; }

 private:
  pid_t made_in_ = ::getpid();
};

[[noreturn]] inline void refuse_fork() {
  throw std::runtime_error("PagedAdamW: expected the process that made the optimizer, got a fork of it");
}

}  // namespace qlora::pager
