#include "caches.h"

#include <unistd.h>

#include <algorithm>

namespace qlora::cpu {

std::int64_t l1_bytes() {
  static const std::int64_t bytes = [] {
    std::int64_t l1 = 0;
#ifdef _SC_LEVEL1_DCACHE_SIZE
    l1 = sysconf(_SC_LEVEL1_DCACHE_SIZE);
#endif
    return std::max<std::int64_t>(l1, 32 << 10);
  }();
  return bytes;
}

std::int64_t l2_bytes() {
  static const std::int64_t bytes = [] {
    std::int64_t l2 = 0;
#ifdef _SC_LEVEL2_CACHE_SIZE
    l2 = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
    return std::max<std::int64_t>(l2, 1 << 20);
  }();
  return bytes;
}

}  // namespace qlora::cpu
