// Memory with a page behind it, or before it, that nobody may touch: sanitizers do not see loads and stores by a mask.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

namespace qlora {

enum class Guard { Behind, Before };

// A copy that lies right at the guard.
class Guarded {
 public:
  Guarded(const void* from, std::size_t bytes, Guard guard) {
    const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE)), pages = (bytes + page - 1) / page * page;
    size_ = pages + 2 * page;
    void* map = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED) throw std::bad_alloc();
    map_ = static_cast<std::uint8_t*>(map);
    mprotect(map_, page, PROT_NONE);
    mprotect(map_ + page + pages, page, PROT_NONE);
    data_ = map_ + page + (guard == Guard::Behind ? pages - bytes : 0);
    if (bytes > 0) std::memcpy(data_, from, bytes);
  }
  template <typename T>
  Guarded(const std::vector<T>& from, Guard guard) : Guarded(from.data(), from.size() * sizeof(T), guard) {}
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  ~Guarded() { munmap(map_, size_); }

  void* data() const { return data_; }
  template <typename T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }

 private:
  std::uint8_t *map_, *data_;
  std::size_t size_;
};

}  // namespace qlora
