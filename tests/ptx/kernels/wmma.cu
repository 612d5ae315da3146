#include <cuda_bf16.h>
#include <mma.h>
#include <cstdint>
using namespace nvcuda;
__global__ void tiles(const __nv_bfloat16* A, const __nv_bfloat16* B, float* C, int N, int K) {
  wmma::fragment<wmma::matrix_a, 16, 16, 16, __nv_bfloat16, wmma::row_major> a;
  wmma::fragment<wmma::matrix_b, 16, 16, 16, __nv_bfloat16, wmma::col_major> b;
  wmma::fragment<wmma::accumulator, 16, 16, 16, float> c;
  wmma::fill_fragment(c, 0.f);
  __shared__ __align__(32) __nv_bfloat16 s[16 * 24];
  int n0 = blockIdx.x * 16;
  for (int k = 0; k < K; k += 16) {
    for (int i = threadIdx.x; i < 256; i += 32) s[(i >> 4) * 24 + (i & 15)] = A[(i >> 4) * K + k + (i & 15)];
    __syncwarp();
    wmma::load_matrix_sync(a, s, 24);
    wmma::load_matrix_sync(b, B + (int64_t)n0 * K + k, K);
    wmma::mma_sync(c, a, b, c);
    __syncwarp();
  }
  for (int i = 0; i < c.num_elements; i++) c.x[i] *= 2.f;
  wmma::store_matrix_sync(C + n0, c, N, wmma::mem_row_major);
}
__global__ void halves(const half* A, const half* B, half* C) {
  wmma::fragment<wmma::matrix_a, 16, 16, 16, half, wmma::row_major> a;
  wmma::fragment<wmma::matrix_b, 16, 16, 16, half, wmma::row_major> b;
  wmma::fragment<wmma::accumulator, 16, 16, 16, half> c;
  wmma::fill_fragment(c, __float2half(0.f));
  wmma::load_matrix_sync(a, A, 16);
  wmma::load_matrix_sync(b, B, 16);
  wmma::mma_sync(c, a, b, c);
  wmma::store_matrix_sync(C, c, 16, wmma::mem_row_major);
}
