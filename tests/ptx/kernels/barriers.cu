#include <cstdint>

// Warp 0 produces, warp 1 consumes, twice through one buffer: barrier 1 says full, barrier 2 says empty.
#ifndef FULL_ARRIVE
#define FULL_ARRIVE asm volatile("bar.arrive 1, 64;" ::: "memory")
#endif
#ifndef EMPTY_SYNC
#define EMPTY_SYNC asm volatile("bar.sync 2, 64;" ::: "memory")
#endif
#ifndef FULL_SYNC
#define FULL_SYNC asm volatile("bar.sync 1, 64;" ::: "memory")
#endif
__global__ void produce_and_consume(const int* x, int* o, int rounds) {
  __shared__ int buffer[32];
  int lane = threadIdx.x & 31;
  if (threadIdx.x < 32) {
    for (int i = 0; i < rounds; ++i) {
      if (i) EMPTY_SYNC;
      buffer[lane] = x[i * 32 + lane];
      FULL_ARRIVE;
    }
  } else {
    for (int i = 0; i < rounds; ++i) {
      FULL_SYNC;
      o[i * 32 + lane] = buffer[31 - lane];
      if (i + 1 < rounds) asm volatile("bar.arrive 2, 64;" ::: "memory");
    }
  }
}

// Each pair of warps exchanges through its own half of the buffer, by a barrier of its own.
__global__ void pairs(const int* x, int* o, int reach) {
  __shared__ int buffer[128];
  int t = threadIdx.x;
  buffer[t] = x[t];
  asm volatile("bar.sync %0, 64;" ::"r"(1 + (t >> 6)) : "memory");
  o[t] = buffer[t ^ reach];
}

__global__ void reductions(const int* x, int* o) {
  int v = x[threadIdx.x];
  o[threadIdx.x] = __syncthreads_count(v & 1) + 1000 * __syncthreads_or(v == 7) + 2000 * __syncthreads_and(v >= 0);
}

__global__ void counted(int* o, int count) {
  asm volatile("bar.sync 1, %0;" ::"r"(count));
  o[threadIdx.x] = 1;
}

__global__ void counts_disagree(int* o) {
  if (threadIdx.x < 32)
    asm volatile("bar.sync 1, 64;");
  else
    asm volatile("bar.sync 1, 96;");
  o[threadIdx.x] = 1;
}

// Warp 0 arrives at barrier 1 but does not wait there: what warp 1 wrote before it is not ordered for warp 0.
__global__ void arriving_is_not_waiting(int* o) {
  __shared__ int buffer[32];
  int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  if (warp == 1) buffer[lane] = lane;
  if (warp == 1) asm volatile("bar.sync 1, 64;" ::: "memory");
  if (warp == 0) asm volatile("bar.arrive 1, 64;" ::: "memory");
  if (warp != 1) asm volatile("bar.sync 2, 64;" ::: "memory");
  if (warp == 0) o[lane] = buffer[lane];
}

// Odd lanes come to the barrier long after the even ones of their warp.
__global__ void late_lanes(const int* x, int* o, int n) {
  int sum = 0;
  if (threadIdx.x & 1) {
    for (int i = 0; i < n; ++i) sum += x[i];
  }
  __syncthreads();
  o[threadIdx.x] = sum;
}
