// The sums of linear_4bit's AVX512 kernels, fp32 and bf16: 16 lanes, of which each run of 32 weights has 4. A file of
// kernels includes this inside its target region.
namespace qlora::cpu {
namespace {

struct SumsAvx512 {
  using Vector = __m512;

  static Vector zero() { return _mm512_setzero_ps(); }
  static Vector multiply_add(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
  static float add_lanes(Vector x) { return _mm512_reduce_add_ps(x); }

  static Vector scales(const float* absmax) {
    const __m512i run = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    return _mm512_permutexvar_ps(run, _mm512_castps128_ps512(_mm_loadu_ps(absmax)));
  }
};

}  // namespace
}  // namespace qlora::cpu
