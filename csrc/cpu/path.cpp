// Detection and override of the CPU path; see path.h.
#include "path.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__aarch64__)
#include <sys/auxv.h>
#endif

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace qlora::cpu {
namespace {

#if defined(__x86_64__) && !defined(QLORA_EXT_EMULATED)
// Linux lets a process use tiles once it has asked.
bool has_amx() {
  unsigned eax, ebx, ecx, edx;
  constexpr unsigned kBf16 = 1u << 22, kTiles = 1u << 24;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0 || (~edx & (kBf16 | kTiles)) != 0) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

Path find_best_path() {
#if defined(QLORA_EXT_EMULATED)  // the vector kernels are made of plain C++: cmake/emulated.cmake
  return Path::Amx;
#elif defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c")) {
    return Path::Portable;
  }
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl")) {
    return Path::Avx2;
  }
  if (!__builtin_cpu_supports("avx512bf16") || !__builtin_cpu_supports("avx512vbmi")) return Path::Avx512;
  return has_amx() ? Path::Amx : Path::Avx512Bf16;
#else
  return Path::Portable;
#endif
}

Path best_path() {
  static const Path path = find_best_path();
  return path;
}

// Intel's AVX512_BF16 does half as many products a second as its fp32 (bench/NOTES.md): where a virtual machine has no
// tiles, the kernels of fp32 are the faster ones for bf16, too.
Path fastest_path() {
#if defined(__x86_64__)
  if (best_path() == Path::Avx512Bf16 && __builtin_cpu_is("intel")) return Path::Avx512;
#endif
  return best_path();
}

Path parse(const std::string& name) {
  std::string runnable;
  int path = 0;
  for (const std::string& candidate : path_names()) {
    if (name == candidate) return static_cast<Path>(path);
    runnable += (path++ == 0 ? "" : ", ") + candidate;
  }
  throw std::invalid_argument("QLORA_EXT_CPU: expected one of " + runnable + " on this machine, got '" + name + "'");
}

std::atomic<Path>& current() {
  static std::atomic<Path> path = [] {
    const char* name = std::getenv("QLORA_EXT_CPU");
    return name == nullptr || *name == '\0' ? fastest_path() : parse(name);
  }();
  return path;
}

}  // namespace

Path path() { return current().load(std::memory_order_relaxed); }

const char* path_name(Path path) {
  constexpr const char* kNames[] = {"portable", "avx2", "avx512", "avx512_bf16", "amx"};
  return kNames[static_cast<int>(path)];
}

std::vector<std::string> path_names() {
  std::vector<std::string> names;
  for (int path = 0; path <= static_cast<int>(best_path()); ++path) {
    names.emplace_back(path_name(static_cast<Path>(path)));
  }
  return names;
}

bool has_native_bf16() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512bf16");
#elif defined(__aarch64__)
  constexpr unsigned long kBf16 = 1ul << 14;  // HWCAP2_BF16, which headers of older systems lack
  return (getauxval(AT_HWCAP2) & kBf16) != 0;
#else
  return false;
#endif
}

bool torch_has_bf16_matrices() {
#if defined(__aarch64__)
  return has_native_bf16();
#else
  return false;
#endif
}

void set_path(const std::string& name) { current().store(parse(name), std::memory_order_relaxed); }

}  // namespace qlora::cpu
