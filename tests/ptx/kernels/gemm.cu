#include <cuda_bf16.h>
#include <cstdint>
// C[M,N] = A[M,K] B[N,K]^T; a block of 4 warps makes a 16 x 32 tile, two stages of cp.async.
#define BK 32
#define BN 32
__device__ __forceinline__ uint32_t sptr(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }
__device__ __forceinline__ void cpa(void* d, const void* s, bool ok) {
  int sz = ok ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(sptr(d)), "l"(s), "r"(sz));
}
__global__ void gemm16(const __nv_bfloat16* __restrict__ A, const __nv_bfloat16* __restrict__ B,
                       __nv_bfloat16* __restrict__ C, float* __restrict__ Cf, int M, int N, int K) {
  __shared__ __align__(16) __nv_bfloat16 As[2][16][BK + 8];
  __shared__ __align__(16) __nv_bfloat16 Bs[2][BN][BK + 8];
  int t = threadIdx.x, lane = t & 31, w = t >> 5;
  int n0 = blockIdx.x * BN, m0 = blockIdx.y * 16;
  float c[4] = {0, 0, 0, 0};
  auto load = [&](int st, int k0) {
    if (t < 64) {
      int r = t >> 2, cc = (t & 3) * 8;
      bool ok = m0 + r < M;
      cpa(&As[st][r][cc], A + (int64_t)(ok ? m0 + r : 0) * K + k0 + cc, ok);
    }
    {
      int r = t >> 2, cc = (t & 3) * 8;
      bool ok = n0 + r < N;
      cpa(&Bs[st][r][cc], B + (int64_t)(ok ? n0 + r : 0) * K + k0 + cc, ok);
    }
    asm volatile("cp.async.commit_group;\n" ::);
  };
  int nk = K / BK;
  load(0, 0);
  for (int ki = 0; ki < nk; ki++) {
    if (ki + 1 < nk) {
      load((ki + 1) & 1, (ki + 1) * BK);
      asm volatile("cp.async.wait_group 1;\n" ::);
    } else
      asm volatile("cp.async.wait_group 0;\n" ::);
    __syncthreads();
    int st = ki & 1;
#pragma unroll
    for (int kk = 0; kk < BK; kk += 16) {
      uint32_t a[4], b[2];
      uint32_t pa = sptr(&As[st][lane & 15][kk + (lane >> 4) * 8]);
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                   : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
                   : "r"(pa));
      uint32_t pb = sptr(&Bs[st][w * 8 + (lane & 7)][kk + ((lane >> 3) & 1) * 8]);
      asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];\n" : "=r"(b[0]), "=r"(b[1]) : "r"(pb));
      asm volatile(
          "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
          : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
#ifndef WITHOUT_LAST_BARRIER
    __syncthreads();
#endif
  }
  int r = m0 + (lane >> 2), cc = n0 + w * 8 + (lane & 3) * 2;
#pragma unroll
  for (int h = 0; h < 2; h++)
    if (r + 8 * h < M && cc < N) {
      *(__nv_bfloat162*)&C[(int64_t)(r + 8 * h) * N + cc] = __floats2bfloat162_rn(c[2 * h], c[2 * h + 1]);
      *(float2*)&Cf[(int64_t)(r + 8 * h) * N + cc] = make_float2(c[2 * h], c[2 * h + 1]);
    }
}
// 16x16 * 16x8 with B as [K, N]: ldmatrix.trans.
__global__ void transposed(const __nv_bfloat16* A, const __nv_bfloat16* B, float* C) {
  __shared__ __align__(16) __nv_bfloat16 As[256], Bs[128];
  int l = threadIdx.x;
  ((uint4*)As)[l] = ((const uint4*)A)[l];
  if (l < 16) ((uint4*)Bs)[l] = ((const uint4*)B)[l];
  __syncwarp();
  uint32_t a[4], b[2];
  float c[4] = {0, 0, 0, 0};
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
               : "r"(sptr(As + (l & 15) * 16 + (l >> 4) * 8)));
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];\n"
               : "=r"(b[0]), "=r"(b[1])
               : "r"(sptr(Bs + (l & 15) * 8)));
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  int r = l >> 2, cc = (l & 3) * 2;
  C[r * 8 + cc] = c[0];
  C[r * 8 + cc + 1] = c[1];
  C[(r + 8) * 8 + cc] = c[2];
  C[(r + 8) * 8 + cc + 1] = c[3];
}
