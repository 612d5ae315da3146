#include <cstdint>
__global__ void vecadd(const float* __restrict__ a, const float* __restrict__ b, float* c, int64_t n, float alpha) {
  int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  int64_t st = (int64_t)gridDim.x * blockDim.x;
  for (; i < n; i += st) c[i] = alpha * a[i] + b[i];
}
