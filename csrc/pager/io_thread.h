// A thread that does jobs in the order they were given. It starts with the first job.
#pragma once

#include <cstdint>
#include <functional>

#include "own_process.h"

namespace qlora::pager {

// After a fork the child has no such thread: there the object may be destroyed, but takes no jobs.
class IoThread {
 public:
  IoThread();
  ~IoThread();  // does what it was given first
  IoThread(const IoThread&) = delete;
  IoThread& operator=(const IoThread&) = delete;

  // The number of the job, from 1.
  std::uint64_t submit(std::function<void()> job);

  // Until the job with this number, and those before it, are done. If one has thrown, that is thrown here, each time:
  // the jobs after it are not done.
  void wait(std::uint64_t number);

  // Throws what a job has thrown, if one has.
  void check() const;

  // Whether this is the process that made the object.
  bool in_own_process() const { return process_.here(); }

  double seconds_waited() const { return seconds_waited_; }

 private:
  struct Shared;
  static void run(Shared& shared);

  Shared* shared_;  // not freed in a forked child, where its locks may be held by a thread that is not there
  OwnProcess process_;
  double seconds_waited_ = 0;
};

}  // namespace qlora::pager
