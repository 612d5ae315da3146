#include <cstdint>

__global__ void copy(const uint4* x, uint4* o) {
  o[blockIdx.x * blockDim.x + threadIdx.x] = x[blockIdx.x * blockDim.x + threadIdx.x];
}
__global__ void strided(const float* x, float* o, int stride) { o[threadIdx.x] = x[threadIdx.x * stride]; }
__global__ void broadcast(const float* x, float* o) { o[threadIdx.x] = x[threadIdx.x >> 4]; }
__global__ void twice(volatile const float* x, float* o) { o[threadIdx.x] = x[threadIdx.x] + x[threadIdx.x]; }
__global__ void count(unsigned* o) { atomicAdd(o + (threadIdx.x & 3), 1u); }

// Half of the copies are 16 bytes, the others are cut to 4 and filled with zeros.
__global__ void copy_async(const float* x, float4* o) {
  __shared__ __align__(16) float4 s[32];
  int t = threadIdx.x;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"((uint32_t)__cvta_generic_to_shared(s + t)),
               "l"(x + 4 * t), "r"(t < 16 ? 16 : 4));
  asm volatile("cp.async.commit_group;\ncp.async.wait_group 0;" ::: "memory");
  o[t] = s[t];
}

// One element of T a thread, `stride` elements apart.
template <class T>
__global__ void bank_stride(T* o, int stride) {
  __shared__ __align__(16) T s[1024];
  for (int i = threadIdx.x; i < 1024; i += 32) s[i] = T{};
  __syncwarp();
  o[threadIdx.x] = s[threadIdx.x * stride & 1023];
}
template __global__ void bank_stride<uint8_t>(uint8_t*, int);
template __global__ void bank_stride<float>(float*, int);
template __global__ void bank_stride<float2>(float2*, int);
template __global__ void bank_stride<float4>(float4*, int);

// Rows of 8 halves, `pitch` halves apart.
__global__ void bank_ldmatrix(uint32_t* o, int pitch) {
  __shared__ __align__(16) uint16_t s[32 * 72];
  for (int i = threadIdx.x; i < 32 * 72; i += 32) s[i] = i;
  __syncwarp();
  uint32_t r[4];
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"((uint32_t)__cvta_generic_to_shared(s + threadIdx.x * pitch)));
  o[threadIdx.x] = r[0] + r[1] + r[2] + r[3];
}
