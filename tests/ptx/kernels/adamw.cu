#include <cuda_bf16.h>
#include <cstdint>
struct Tab {
  float* p[24];
  const __nv_bfloat16* g[24];
  float* m[24];
  float* v[24];
  int64_t n[24];
  int cnt;
  uint8_t blk2t[64];
  int blk2c[64];
};
__global__ void adamw(const __grid_constant__ Tab T, float lr, float b1, float b2, float eps, float wd, float bc1,
                      float bc2, int chunk, float* gnorm) {
  int t = T.blk2t[blockIdx.x];
  int64_t off = (int64_t)T.blk2c[blockIdx.x] * chunk;
  float* p = T.p[t];
  const __nv_bfloat16* g = T.g[t];
  float* m = T.m[t];
  float* v = T.v[t];
  int64_t n = T.n[t];
  float clip = rsqrtf(*gnorm + 1.f);
  for (int64_t i = off + threadIdx.x; i < min(off + chunk, n); i += blockDim.x) {
    float gg = __bfloat162float(g[i]) * clip;
    float pp = p[i] * (1.f - lr * wd);
    float mm = b1 * m[i] + (1.f - b1) * gg;
    float vv = b2 * v[i] + (1.f - b2) * gg * gg;
    float d = sqrtf(vv / bc2) + eps;
    p[i] = pp - lr * (mm / bc1) / d;
    m[i] = mm;
    v[i] = vv;
  }
}
__global__ void mathfn(const float* x, float* o, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  float v = x[i];
  float* r = o + i * 12;
  r[0] = expf(v);
  r[1] = logf(fabsf(v) + 1e-3f);
  r[2] = tanhf(v);
  r[3] = powf(fabsf(v) + .1f, 1.7f);
  r[4] = rsqrtf(fabsf(v) + 1e-6f);
  r[5] = __expf(v);
  r[6] = v / (1.f + __expf(-v));
  r[7] = erff(v);
  r[8] = sinf(v * 50.f);
  r[9] = fmodf(v, 0.7f);
  r[10] = (float)((double)v * 3.0 / 7.0);
  r[11] = __fdividef(v, 3.f) + rintf(v) + floorf(v) + copysignf(1.f, v);
}
