// The sizes of the caches, as the system tells them.
#include "caches.h"

#include <unistd.h>

#include <algorithm>

namespace qlora::cpu {
namespace {

#ifdef _SC_LEVEL1_DCACHE_SIZE
constexpr int kL1 = _SC_LEVEL1_DCACHE_SIZE, kL2 = _SC_LEVEL2_CACHE_SIZE, kL3 = _SC_LEVEL3_CACHE_SIZE;
#else
constexpr int kL1 = -1, kL2 = -1, kL3 = -1;  // for which sysconf gives -1
#endif

}  // namespace

std::int64_t l1_bytes() {
  static const auto bytes = std::max<std::int64_t>(sysconf(kL1), 32 << 10);
  return bytes;
}

std::int64_t l2_bytes() {
  static const auto bytes = std::max<std::int64_t>(sysconf(kL2), 1 << 20);
  return bytes;
}

std::int64_t l3_bytes() {
  static const auto bytes = std::max<std::int64_t>(sysconf(kL3), 32 << 20);
  return bytes;
}

}  // namespace qlora::cpu
