// at::parallel_for whose threads round as the caller does: torch.set_flush_denormal concerns the calling thread alone,
// so that results would depend on which thread computes what.
#pragma once

#include <ATen/Parallel.h>

#include <cfenv>

namespace qlora {

// How the thread that makes it rounds, subnormal numbers included.
struct Rounding {
  std::fenv_t environment;
  Rounding() { std::fegetenv(&environment); }
};

// While it lives, this thread rounds like another.
class RoundingLike {
 public:
  explicit RoundingLike(const Rounding& other) { std::fesetenv(&other.environment); }
  ~RoundingLike() { std::fesetenv(&own_.environment); }
  RoundingLike(const RoundingLike&) = delete;
  RoundingLike& operator=(const RoundingLike&) = delete;

 private:
  const Rounding own_;
};

template <typename Work>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Work& work) {
  const Rounding callers;
  at::parallel_for(begin, end, grain, [&](int64_t first, int64_t last) {
    const RoundingLike caller(callers);
    work(first, last);
  });
}

}  // namespace qlora
