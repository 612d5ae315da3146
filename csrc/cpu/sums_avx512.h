// The sums of linear_4bit's AVX512 kernels, fp32 and bf16, and the absmax of their 16 lanes: those of the runs of 32
// weights that Isa::run_of_lane names. A file of kernels includes this inside its target region.
namespace qlora::cpu {
namespace {

struct SumsAvx512 {
  using Vector = __m512;

  static Vector zero() { return _mm512_setzero_ps(); }
  static Vector multiply_add(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
  static void decode_absmax(const Packed4bit& w, std::int64_t first, std::int64_t count, float* absmax) {
    decode_absmax_avx512(w, first, count, absmax);
  }
  static Vector add_lanes(const Vector* x) { return across_lanes(x, Sum{}); }
};

template <typename Isa>
struct LanesAvx512 {
  __m512i block;

  explicit LanesAvx512(std::int64_t blocksize) {
    std::int32_t blocks[16];
    for (int lane = 0; lane < 16; ++lane)
      blocks[lane] = static_cast<std::int32_t>(Isa::run_of_lane(lane) * kRun / blocksize);
    block = _mm512_loadu_si512(blocks);
  }

  __m512 scales(const float* absmax) const {
    return _mm512_permutexvar_ps(block, _mm512_castps256_ps512(_mm256_loadu_ps(absmax)));
  }
};

}  // namespace
}  // namespace qlora::cpu
