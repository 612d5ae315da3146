// at::parallel_for whose threads round as the caller does: torch.set_flush_denormal concerns the calling thread alone,
// so that results would depend on which thread computes what.
#pragma once

#include <ATen/Parallel.h>

#if defined(__x86_64__)
#include <xmmintrin.h>
#else
#include <cfenv>
#endif

namespace qlora {

// How the thread that makes it rounds, subnormal numbers included.
class Rounding {
 public:
#if defined(__x86_64__)  // <cfenv> would store and load the x87 unit, too, which takes longer than all else here
  Rounding() : control_(_mm_getcsr() & ~kOccurred) {}
  bool operator==(const Rounding& other) const { return control_ == other.control_; }
  void take() const { _mm_setcsr(control_); }

 private:
  static constexpr unsigned kOccurred = 0x3f;  // exceptions, so far
  unsigned control_;
#else
  Rounding() { std::fegetenv(&environment_); }
  bool operator==(const Rounding&) const { return false; }  // not known
  void take() const { std::fesetenv(&environment_); }

 private:
  std::fenv_t environment_;
#endif
};

// While it lives, this thread rounds like another.
class RoundingLike {
 public:
  explicit RoundingLike(const Rounding& other) : same_(own_ == other) {
    if (!same_) other.take();
  }
  ~RoundingLike() {
    if (!same_) own_.take();
  }
  RoundingLike(const RoundingLike&) = delete;
  RoundingLike& operator=(const RoundingLike&) = delete;

 private:
  const Rounding own_;
  const bool same_;
};

// Elements (or bytes of work) a thread should have before another is worth waking.
constexpr int64_t kGrain = 32768;

template <typename Work>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Work& work) {
  const Rounding callers;
  at::parallel_for(begin, end, grain, [&](int64_t first, int64_t last) {
    const RoundingLike caller(callers);
    work(first, last);
  });
}

}  // namespace qlora
