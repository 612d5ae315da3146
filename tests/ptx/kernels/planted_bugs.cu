#include <cuda_bf16.h>
#include <cstdint>
__device__ __forceinline__ uint32_t sptr(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }
__global__ void store_out_of_bounds(float* o, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i <= n) o[i] = 1;
}
__global__ void load_out_of_bounds(const float* x, float* o, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) o[i] = x[i] + x[i + 1];
}
__global__ void misaligned(const float* x, float* o) {
  float4 v = *(const float4*)(x + 1 + threadIdx.x * 4);
  o[threadIdx.x] = v.x + v.y + v.z + v.w;
}
__global__ void shared_out_of_bounds(float* o) {
  __shared__ float s[64];
  s[threadIdx.x + 1] = 1.f;
  __syncthreads();
  o[threadIdx.x] = s[threadIdx.x];
}
__global__ void missing_syncthreads(const float* x, float* o) {
  __shared__ float s[128];
  s[threadIdx.x] = x[threadIdx.x];
  o[threadIdx.x] = s[127 - threadIdx.x];
}
__global__ void missing_syncwarp(const float* x, float* o) {
  __shared__ float s[32];
  s[threadIdx.x] = x[threadIdx.x];
  o[threadIdx.x] = s[31 - threadIdx.x];
}
__global__ void overwritten_too_early(const float* x, float* o) {
  __shared__ float s[128];
  float a = 0;
  for (int i = 0; i < 3; i++) {
    s[threadIdx.x] = x[threadIdx.x] * i;
    __syncthreads();
    a += s[127 - threadIdx.x];
  }
  o[threadIdx.x] = a;
}
__global__ void uninitialised_shared(float* o) {
  __shared__ float s[64];
  if (threadIdx.x < 60) s[threadIdx.x] = 1;
  __syncthreads();
  o[threadIdx.x] = s[63 - threadIdx.x];
}
__global__ void divergent_shuffle(const int* x, int* o) {
  int v = x[threadIdx.x];
  if (v & 1) v += __shfl_xor_sync(~0u, v, 1);
  o[threadIdx.x] = v;
}
__global__ void wrong_shuffle_mask(const int* x, int* o) {
  int v = x[threadIdx.x];
  unsigned m = __ballot_sync(~0u, v & 1);
  if (v & 1) v = __shfl_xor_sync(m, v, 1);
  o[threadIdx.x] = v;
}
__global__ void divergent_barrier(const int* x, int* o) {
  if (x[threadIdx.x] & 1) {
    __syncthreads();
    o[threadIdx.x] = 1;
  } else {
    while (((volatile int*)o)[0] == 99) {
    }
    o[threadIdx.x] = 2;
    __syncthreads();
    __syncthreads();
  }
}
__global__ void endless(int* o) { while (((volatile int*)o)[0] == 0); }
__global__ void missing_wait(const float* x, float* o) {
  __shared__ __align__(16) float s[128];
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;\n" ::"r"(sptr(s + threadIdx.x * 4)),
               "l"(x + threadIdx.x * 4));
  asm volatile("cp.async.commit_group;\n");
  __syncthreads();
  o[threadIdx.x] = s[threadIdx.x * 4];
}
__global__ void missing_barrier_after_wait(const float* x, float* o) {
  __shared__ __align__(16) float s[256];
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;\n" ::"r"(sptr(s + threadIdx.x * 4)),
               "l"(x + threadIdx.x * 4));
  asm volatile("cp.async.commit_group;\ncp.async.wait_group 0;\n");
  o[threadIdx.x] = s[(63 - threadIdx.x) * 4];
}
__global__ void colliding_threads(const float* x, float* o) { o[threadIdx.x & 7] = x[threadIdx.x]; }
__global__ void colliding_blocks(const float* x, float* o) {
  o[threadIdx.x] = x[blockIdx.x * blockDim.x + threadIdx.x];
}
__global__ void store_to_const(float* x) { x[threadIdx.x] = 1; }

__global__ void local_out_of_bounds(int* o, int n) {
  int a[4];
  for (int i = 0; i <= n; ++i) a[i] = i;
  o[threadIdx.x] = a[o[threadIdx.x] & 3];
}
__global__ void half_a_warp_at_the_barrier(float* o) {
  if (threadIdx.x & 1) __syncthreads();
  o[threadIdx.x] = 1;
}
__global__ void deadlock(float* o) {
  if (threadIdx.x < 32) asm volatile("bar.sync 1, 64;");
  o[threadIdx.x] = 1;
}
__global__ void lane_outside_its_mask(int* o) { o[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, o[threadIdx.x], 1); }
__global__ void lanes_that_never_come(int* o) {
  if (threadIdx.x & 1) {
    o[threadIdx.x] = __reduce_add_sync(~0u, o[threadIdx.x]);
  } else {
    __syncwarp(0x55555555u);
    asm volatile("bar.sync 0;");
  }
}
__global__ void store_not_fenced(float* o, unsigned* ticket) {
  o[blockIdx.x] = blockIdx.x + 1;
  __shared__ unsigned t;
  if (threadIdx.x == 0) t = atomicAdd(ticket, 1u);
  __syncthreads();
  if (t == gridDim.x - 1) o[gridDim.x] = ((volatile float*)o)[threadIdx.x & 1];
}
__global__ void blocks_disagree(float* o) { o[0] = blockIdx.x; }
__global__ void atomic_then_plain(unsigned* o) {
  __shared__ unsigned s;
  if (threadIdx.x == 0) s = 0;
  __syncthreads();
  atomicAdd(&s, 1u);
  o[threadIdx.x] = s;
}
__global__ void nc_of_written(float* o) {
  o[threadIdx.x] = 1;
  float v;
  asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(v) : "l"(o + threadIdx.x));
  o[threadIdx.x] = v + 1;
}
__global__ void counter_never_zeroed(unsigned* o) { atomicAdd(o, 1u); }
__global__ void trapped(const int* x) {
  if (x[threadIdx.x] > 62) __trap();
}
__global__ void broadcast_then_overwritten(float* o) {
  __shared__ float s[1];
  s[0] = 1;
  __syncthreads();
  float v = s[0];
  if (threadIdx.x == 31) s[0] = 2;
  o[threadIdx.x] = v;
}
// Not wrong in any single schedule: the order in which warps, blocks or atomics come decides the result.
__global__ void order_of_warps(int* o) {
  __shared__ int next;
  if (threadIdx.x == 0) next = 0;
  __syncthreads();
  int mine = 0;
  if ((threadIdx.x & 31) == 0) mine = atomicAdd(&next, 1);
  o[threadIdx.x] = __shfl_sync(~0u, mine, 0);
}
__global__ void order_of_blocks(int* o, int* ticket) {
  if (threadIdx.x == 0) o[blockIdx.x] = atomicAdd(ticket, 1);
}
__global__ void race_on_global(volatile int* o) {
  o[threadIdx.x] = threadIdx.x + 1;
  o[128 + threadIdx.x] = o[127 - threadIdx.x];
}
__global__ void vector_out_of_bounds(const float4* x, float* o) {
  float4 v = x[threadIdx.x];
  o[threadIdx.x] = v.x + v.y + v.z + v.w;
}
