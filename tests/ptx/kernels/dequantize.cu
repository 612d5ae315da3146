#include <cuda_bf16.h>
#include <cstdint>
// A table of 256 pairs in shared memory; 16-byte loads (32 nibbles), 64-byte stores.
__global__ void dequantize(const uint4* __restrict__ q, const float* __restrict__ amax, const float* __restrict__ code,
                           __nv_bfloat162* __restrict__ out, int64_t nvec) {
  __shared__ __nv_bfloat162 lut[256];
  for (int i = threadIdx.x; i < 256; i += blockDim.x) lut[i] = __floats2bfloat162_rn(code[i >> 4], code[i & 15]);
  __syncthreads();
  int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= nvec) return;
  uint4 v = q[i];
  __nv_bfloat162 s = __float2bfloat162_rn(amax[i >> 1]);
  uint32_t w[4] = {v.x, v.y, v.z, v.w};
  uint4 o[4];
#pragma unroll
  for (int k = 0; k < 4; k++) {
    uint32_t r[4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
      uint32_t b = __byte_perm(w[k], 0, 0x4440 | j);
      __nv_bfloat162 t = __hmul2(lut[b], s);
      r[j] = *(uint32_t*)&t;
    }
    o[k] = make_uint4(r[0], r[1], r[2], r[3]);
  }
  uint4* op = (uint4*)(out) + i * 4;
#pragma unroll
  for (int k = 0; k < 4; k++) op[k] = o[k];
}
__global__ void bf16_operations(const __nv_bfloat162* a, const __nv_bfloat162* b, __nv_bfloat162* o, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  __nv_bfloat162 x = a[i], y = b[i];
  o[i * 6 + 0] = __hadd2(x, y);
  o[i * 6 + 1] = __hmul2(x, y);
  o[i * 6 + 2] = __hfma2(x, y, x);
  o[i * 6 + 3] = __hsub2(x, y);
  o[i * 6 + 4] = __hmax2(x, y);
  uint32_t u = *(uint32_t*)&x, v = *(uint32_t*)&y;
  uint32_t p = __byte_perm(u, v, 0x5410);
  o[i * 6 + 5] = *(__nv_bfloat162*)&p;
}
