#include <cstdint>
struct Pair {
  short a;
  int64_t b;
};
extern "C" __global__ void arguments(int64_t* o, Pair p, float f, double d, bool flag, uint8_t small, const int* none,
                                     unsigned short h) {
  o[0] = p.a;
  o[1] = p.b;
  o[2] = (int64_t)(f * 4);
  o[3] = (int64_t)(d * 8);
  o[4] = flag;
  o[5] = small;
  o[6] = none == nullptr;
  o[7] = h;
}
extern "C" __global__ void __launch_bounds__(64) bounded(int* o) { o[threadIdx.x] = 1; }
extern "C" __global__ void places(int* o) {
  int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  o[block * blockDim.x * blockDim.y * blockDim.z + thread] = block * 1000 + thread;
}
extern "C" __global__ void follow(int** table, int n) {
  for (int i = 0; i < n; ++i) *table[i] += i;
}
extern "C" __global__ void dynamic(float* o) {
  extern __shared__ float s[];
  s[threadIdx.x] = 1;
  o[threadIdx.x] = s[threadIdx.x];
}
extern "C" __global__ void wide(const unsigned char* x, long long offset, int* o) { *o = x[offset]; }
extern "C" __global__ void generic(int* o, int where) {
  __shared__ int s;
  int l = 3;
  s = 5;
  int* p = where == 0 ? &s : where == 1 ? &l : o;
  if (where == 3) p = threadIdx.x ? &s : o;
  *p += 1;
  asm volatile("" ::"l"(&l));
  o[1 + threadIdx.x] = *p;
}
extern "C" __global__ void wait_for_another_block(volatile int* flag, int* o) {
  if (blockIdx.x == 0) {
    while (!*flag);
    *o = 7;
  } else {
    __threadfence();
    *flag = 1;
  }
}
extern "C" __global__ void clocks(long long* o) { *o = clock64(); }
