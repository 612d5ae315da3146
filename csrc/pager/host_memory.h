// Memory for a page, in zeros that take no memory until they are touched; given back to the system when freed.
#pragma once

#include <cstddef>
#include <cstdint>

namespace qlora::pager {

std::byte* allocate_host(std::int64_t bytes);  // std::runtime_error if there is none
void release_host(std::byte* memory, std::int64_t bytes);

}  // namespace qlora::pager
