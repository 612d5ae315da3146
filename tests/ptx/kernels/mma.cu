#include <cuda_fp16.h>
#include <cstdint>
// Fragments loaded by hand from the tables of the PTX ISA. A is [16, K], B [8, K].
__global__ void fragments(const __half* A, const __half* B, float* C, __half* Ch, const int8_t* Ai, const int8_t* Bi,
                          int* Ci, const float* At, const float* Bt, float* Ct) {
  int l = threadIdx.x, g = l >> 2, q = l & 3;
  {
    uint32_t a[4], b[2];
    float c[4] = {0, 0, 0, 0};
    auto L = [&](const __half* p, int r, int k) { return *(const uint32_t*)(p + r * 16 + k); };
    a[0] = L(A, g, q * 2);
    a[1] = L(A, g + 8, q * 2);
    a[2] = L(A, g, q * 2 + 8);
    a[3] = L(A, g + 8, q * 2 + 8);
    b[0] = L(B, g, q * 2);
    b[1] = L(B, g, q * 2 + 8);
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    C[g * 8 + q * 2] = c[0];
    C[g * 8 + q * 2 + 1] = c[1];
    C[(g + 8) * 8 + q * 2] = c[2];
    C[(g + 8) * 8 + q * 2 + 1] = c[3];
    uint32_t d[2] = {0, 0};
    asm("mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%0,%1}, {%2,%3,%4,%5}, {%6,%7}, {%0,%1};"
        : "+r"(d[0]), "+r"(d[1])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    *(uint32_t*)(Ch + g * 8 + q * 2) = d[0];
    *(uint32_t*)(Ch + (g + 8) * 8 + q * 2) = d[1];
  }
  {
    uint32_t a[4], b[2];
    int c[4] = {0, 0, 0, 0};
    auto L = [&](const int8_t* p, int r, int k) { return *(const uint32_t*)(p + r * 32 + k); };
    a[0] = L(Ai, g, q * 4);
    a[1] = L(Ai, g + 8, q * 4);
    a[2] = L(Ai, g, q * 4 + 16);
    a[3] = L(Ai, g + 8, q * 4 + 16);
    b[0] = L(Bi, g, q * 4);
    b[1] = L(Bi, g, q * 4 + 16);
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    Ci[g * 8 + q * 2] = c[0];
    Ci[g * 8 + q * 2 + 1] = c[1];
    Ci[(g + 8) * 8 + q * 2] = c[2];
    Ci[(g + 8) * 8 + q * 2 + 1] = c[3];
  }
  {
    uint32_t a[4], b[2];
    float c[4] = {0, 0, 0, 0};
    auto L = [&](const float* p, int r, int k) {
      uint32_t t;
      asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(t) : "f"(p[r * 8 + k]));
      return t;
    };
    a[0] = L(At, g, q);
    a[1] = L(At, g + 8, q);
    a[2] = L(At, g, q + 4);
    a[3] = L(At, g + 8, q + 4);
    b[0] = L(Bt, g, q);
    b[1] = L(Bt, g, q + 4);
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    Ct[g * 8 + q * 2] = c[0];
    Ct[g * 8 + q * 2 + 1] = c[1];
    Ct[(g + 8) * 8 + q * 2] = c[2];
    Ct[(g + 8) * 8 + q * 2 + 1] = c[3];
  }
}

// Four 8x8 matrices written transposed or not, from registers that name their row and column.
template <bool kTranspose>
__global__ void store_matrices(uint16_t* out) {
  __shared__ __align__(16) uint16_t tile[256];
  int lane = threadIdx.x, row = lane >> 2, column = 2 * (lane & 3);
  uint32_t words[4];
  for (int i = 0; i < 4; ++i) {
    words[i] = (i * 64 + row * 8 + column) | (i * 64 + row * 8 + column + 1) << 16;
  }
  uint32_t at = __cvta_generic_to_shared(tile + lane * 8);
  if (kTranspose) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(at), "r"(words[0]),
                 "r"(words[1]), "r"(words[2]), "r"(words[3]));
  } else {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(at), "r"(words[0]),
                 "r"(words[1]), "r"(words[2]), "r"(words[3]));
  }
  __syncwarp();
  for (int i = lane; i < 256; i += 32) out[i] = tile[i];
}
template __global__ void store_matrices<false>(uint16_t*);
template __global__ void store_matrices<true>(uint16_t*);

// ldmatrix reads for its whole warp at once, so the warp may write again without a __syncwarp between.
__global__ void written_after_ldmatrix(uint32_t* out) {
  __shared__ __align__(16) uint16_t tile[8 * 8];
  uint32_t at = __cvta_generic_to_shared(tile + (threadIdx.x & 7) * 8), sum = 0;
  for (int i = 0; i < 3; ++i) {
    tile[2 * threadIdx.x] = tile[2 * threadIdx.x + 1] = i;
    __syncwarp();
    uint32_t word;
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(word) : "r"(at) : "memory");
    sum += word;
  }
  out[threadIdx.x] = sum;
}
