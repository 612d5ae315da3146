#include <cstdint>

__global__ void hints(const uint4* p, uint4* o, int* q, const float* fx) {
  int t = threadIdx.x;
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p + t));
  uint64_t pol;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(pol));
  uint32_t z;
  asm volatile("ld.global.L2::cache_hint.u32 %0, [%1], %2;" : "=r"(z) : "l"(p + t), "l"(pol));
  v.x += z;
  uint32_t l3;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(l3) : "r"(v.x), "r"(v.y), "r"(0x0f0f0f0fu));
  v.y = l3;
  uint32_t e;
  asm volatile("{\n.reg .pred p;\n elect.sync _|p, 0xffffffff;\n selp.u32 %0,1,0,p;\n}" : "=r"(e));
  v.z += e;
  uint32_t pk;
  asm("cvt.pack.sat.s8.s32.b32 %0, %1, %2, %3;" : "=r"(pk) : "r"((int)fx[t]), "r"(-300), "r"(0x1234));
  v.w = pk;
  asm volatile("st.global.cs.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(o + t), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w));
  __stcs(q + t, __ldcg(q + t) + 1);
  asm volatile("red.global.add.s32 [%0], %1;" ::"l"(q + 64), "r"(t));
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}
