// The sizes of the caches that a core has, alone or with others, on this machine.
#pragma once

#include <cstdint>

namespace qlora::cpu {

std::int64_t l1_bytes();  // for data; at least 32 KB, which it is taken for where the system does not tell
std::int64_t l2_bytes();  // at least 1 MB, likewise
std::int64_t l3_bytes();  // at least 32 MB, likewise

}  // namespace qlora::cpu
