// The sizes of a core's caches, on this machine.
#pragma once

#include <cstdint>

namespace qlora::cpu {

std::int64_t l1_bytes();  // for data; at least 32 KB, which it is taken for where the system does not tell
std::int64_t l2_bytes();  // at least 1 MB, likewise

}  // namespace qlora::cpu
