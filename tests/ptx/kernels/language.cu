#include <cooperative_groups.h>
#include <cooperative_groups/reduce.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cassert>
#include <cstdint>
#include <cstdio>
namespace cg = cooperative_groups;

struct Scale {
  float a;
  int k;
};
__device__ __noinline__ float scaled_sum(float x, int count, Scale scale) {
  float sum = 0;
  for (int i = 0; i < count; i++) sum += x * scale.a + i;
  return scale.k & 1 ? -sum : sum;
}
__device__ __noinline__ int sum_of(int* values, int count) {
  int sum = 0;
  for (int i = 0; i < count; i++) sum += values[i];
  return sum;
}

// Calls with pointers to local memory and structs by value.
__global__ void calls(const int* x, int64_t* o, float* fo) {
  int t = threadIdx.x, v = x[t], local[16];
  for (int i = 0; i < 16; i++) local[i] = v * i + (i ^ t);
  local[v & 15] ^= 0x55;
  o[t] = sum_of(local, (v & 7) + 8);
  fo[t] = scaled_sum((float)t, (v & 3) + 1, Scale{1.5f, v});
}

__global__ void switches(const int* x, int64_t* o) {
  int64_t v = x[threadIdx.x], r = v * 3;
  switch (v & 7) {
    case 0:
      r += 11;
      break;
    case 1:
      r *= 3;
      break;
    case 2:
      r -= 77;
      break;
    case 3:
      r ^= 0x1234;
      break;
    case 4:
      r = ~r;
      break;
    case 5:
      r <<= 3;
      break;
    case 6:
      r = r / 7;
      break;
    default:
      r = r % 13;
  }
  o[threadIdx.x] = r;
}

constexpr int kResults = 24;
__global__ void integers(const int* x, int64_t* o, int n) {
  int t = threadIdx.x, v = x[t];
  int64_t* r = o + t * kResults;
  r[0] = (int64_t)v * (v + 1) / (t + 1);
  r[1] = __mul64hi((long long)v << 33, 0x123456789abcdefLL);
  r[2] = __mulhi(v, 77777);
  r[3] = __umulhi(v, 0xdeadbeefu);
  r[4] = __popc(v);
  r[5] = __clz(v);
  r[6] = __ffs(v);
  r[7] = __brev(v);
  r[8] = __popcll((long long)v * v);
  r[9] = __clzll((long long)v * v);
  r[10] = __dp4a(v, 0x01fe7f80, 5);
  r[11] = __funnelshift_l(v, t, 5);
  r[12] = __funnelshift_r(v, t, v & 31);
  r[13] = __byte_perm(v, t * 0x1010101, 0x5e2b);
  r[14] = v >> 31;
  r[15] = (unsigned)v >> 3;
  r[16] = __sad(v, t, 3u);
  r[17] = (int8_t)v;
  r[18] = (uint16_t)v;
  r[19] = (unsigned)v % ((t & 7) + 3u);
  r[20] = v % ((t & 7) + 3);
  r[21] = (unsigned)v << (v & 31);
  if (n == 12345) {  // never, but it must compile to what the interpreter knows
    assert(v > 0);
    printf("%d\n", v);
  }
}

__global__ void warps(const int* x, unsigned* o) {
  int t = threadIdx.x, v = x[t];
  unsigned* r = o + t * kResults;
  r[0] = __ballot_sync(~0u, v & 1);
  r[1] = __any_sync(~0u, v == x[0]);
  r[2] = __all_sync(~0u, v != 12345);
  r[3] = __match_any_sync(~0u, v & 3);
  r[4] = __reduce_add_sync(~0u, (unsigned)v);
  r[5] = __reduce_max_sync(~0u, v);
  int same;
  r[6] = __match_all_sync(~0u, t < 32 ? 5 : v, &same);
  r[7] = same;
  if (v & 1) {
    r[8] = __activemask();
    r[9] = __shfl_sync(__activemask(), v, __ffs(__activemask()) - 1);
  }
  __syncwarp();
  r[10] = __shfl_up_sync(~0u, v, 3);
  r[11] = __shfl_sync(~0u, v, t + 5, 8);
  r[12] = __shfl_down_sync(~0u, v, 2, 16);
  r[13] = __shfl_xor_sync(~0u, v, 9);
  auto tile = cg::tiled_partition<16>(cg::this_thread_block());
  r[14] = cg::reduce(tile, (unsigned)v, cg::plus<unsigned>());
  asm volatile(
      "{\n .reg .pred p, q;\n setp.ne.s32 q, %1, 0;\n vote.sync.uni.pred p, q, 0xffffffff;\n selp.u32 %0, 1, 0, p;\n}"
      : "=r"(r[15])
      : "r"(t & 32));
  asm volatile("mov.u32 %0, %%lanemask_eq;" : "=r"(r[16]));
  asm volatile("mov.u32 %0, %%lanemask_lt;" : "=r"(r[17]));
  asm volatile("mov.u32 %0, %%lanemask_le;" : "=r"(r[18]));
  asm volatile("mov.u32 %0, %%lanemask_gt;" : "=r"(r[19]));
  asm volatile("mov.u32 %0, %%lanemask_ge;" : "=r"(r[20]));
}

__global__ void halves(const __half2* a, const __half2* b, __half2* o, float* f, int n) {
  int i = threadIdx.x;
  if (i >= n) return;
  __half2 x = a[i], y = b[i];
  o[i * 5] = __hadd2(x, y);
  o[i * 5 + 1] = __hmul2(x, y);
  o[i * 5 + 2] = __hfma2(x, y, x);
  o[i * 5 + 3] = __hmin2(x, y);
  o[i * 5 + 4] = __h2div(x, y);
  f[i] = __half2float(__low2half(x)) + (float)__hlt(x.x, y.x);
}

__global__ void atomics(unsigned long long* a, float* f, __nv_bfloat162* b, int* c, double* d, unsigned* ring) {
  int t = threadIdx.x + blockIdx.x * blockDim.x;
  atomicAdd(a, (unsigned long long)t);
  atomicMax(c, t * 37 % 101);
  atomicMin(c + 1, t * 37 % 101);
  atomicAdd(f, 0.5f * t);
  atomicAdd(b, __floats2bfloat162_rn(1.f, 2.f));
  atomicAdd(d, 0.25 * t);
  atomicInc(ring, 6u);
  atomicOr(ring + 1, 1u << (t & 31));
  atomicDec(ring + 2, 9u);
  unsigned long long old = a[1], assumed;
  do {
    assumed = old;
    old = atomicCAS(a + 1, assumed, assumed + 3);
  } while (assumed != old);
  atomicExch(c + 2, t);
}

__device__ float4 quadruples[4] = {{1, 2, 3, 4}};
__device__ unsigned counter = 7;
__global__ void variables(float* o) {
  counter += 1;
  o[0] = quadruples[0].x + quadruples[0].w;
  o[1] = counter;
  quadruples[1] = make_float4(o[0], 0, 0, 0);
  o[2] = quadruples[1].x;
}
