// The instructions that CUDA C++ has no name for. This is the only file with inline PTX.
#pragma once

#include <cstdint>

#include "../dtype.h"

// Below sm_80 there is no such mma and no cp.async: the kernels that are made of them are not there (kLeastFusedMajor).
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
#define QLORA_FUSED 1
#else
#define QLORA_FUSED 0
#pragma nv_diag_suppress 177  // what only they refer to
#endif

namespace qlora::cuda {

// d = a (16 x 16) @ b (16 x 8) in fp32, or d += a @ b. Lane 4 g + t holds, of a, the pairs of columns 2t, 2t+1 in rows
// g and g + 8, then the same of columns 2t+8, 2t+9; of b the pairs of those rows in column g; of d columns 2t, 2t+1 in
// rows g and g + 8.
template <typename T>
__device__ __forceinline__ void mma(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1);
template <typename T>
__device__ __forceinline__ void mma_add(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1);

#define QLORA_MMA(TYPE, NAME)                                                                                 \
  template <>                                                                                                 \
  __device__ __forceinline__ void mma<TYPE>(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0,     \
                                            std::uint32_t b1) {                                               \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME                                                \
        ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %10, %10, %10};"                            \
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])                                                      \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.0f));                           \
  }                                                                                                           \
  template <>                                                                                                 \
  __device__ __forceinline__ void mma_add<TYPE>(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, \
                                                std::uint32_t b1) {                                           \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME                                                \
        ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                                \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                      \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                                      \
  }
QLORA_MMA(BFloat16, "bf16")
QLORA_MMA(Half, "f16")
#undef QLORA_MMA

// The value itself, of which the compiler knows nothing: it cannot compute ahead with it, and keep registers for that.
__device__ __forceinline__ int opaque(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

// The bits of a where the mask has ones, else those of b.
template <std::uint32_t kMask>
__device__ __forceinline__ std::uint32_t merge_bits(std::uint32_t a, std::uint32_t b) {
  std::uint32_t merged;
  asm("lop3.b32 %0, %1, %2, %3, 0xe4;" : "=r"(merged) : "r"(a), "r"(b), "n"(kMask));
  return merged;
}

// Weights pass once: they need no place in L1, and L2 may fetch the whole line ahead of the next step. Without `inside`
// nothing is read and the result is any value (not the old one, which would cost a move).
__device__ __forceinline__ void load_once(uint2& value, const std::uint8_t* from, bool inside) {
  asm volatile(
      "{ .reg .pred inside; setp.ne.s32 inside, %3, 0;\n"
      "@inside ld.global.nc.L1::no_allocate.L2::128B.v2.u32 {%0, %1}, [%2]; }"
      : "=r"(value.x), "=r"(value.y)
      : "l"(from), "r"(static_cast<int>(inside)));
}

__device__ __forceinline__ void load_once(std::uint32_t& value, const std::uint8_t* from, bool inside) {
  asm volatile(
      "{ .reg .pred inside; setp.ne.s32 inside, %2, 0;\n"
      "@inside ld.global.nc.L1::no_allocate.L2::128B.u32 %0, [%1]; }"
      : "=r"(value)
      : "l"(from), "r"(static_cast<int>(inside)));
}

// 16 bytes of shared memory at once: the compiler may make two loads of them, whose banks conflict.
__device__ __forceinline__ uint4 load_shared_16(const void* from) {
  uint4 value;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "r"(static_cast<std::uint32_t>(__cvta_generic_to_shared(from)))
               : "memory");
  return value;
}

// Copies 16 bytes from global to shared memory without waiting; the last 16 - `bytes` of them are zeros.
__device__ __forceinline__ void cp_async(void* to, const void* from, int bytes) {
  const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending of this thread's groups are unfinished.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace qlora::cuda
