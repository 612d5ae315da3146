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
  // The total of each of 16 vectors: pairs of vectors become one of twice as many, shorter sums, four times.
  static Vector add_lanes(const Vector* x) {
    Vector eight[8], four[4];
    for (int i = 0; i < 8; ++i) {
      eight[i] = _mm512_unpacklo_ps(x[2 * i], x[2 * i + 1]) + _mm512_unpackhi_ps(x[2 * i], x[2 * i + 1]);
    }
    for (int i = 0; i < 4; ++i) {
      const __m512d a = _mm512_castps_pd(eight[2 * i]), b = _mm512_castps_pd(eight[2 * i + 1]);
      four[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b)) + _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
    const Vector low = add_quarters(four[0], four[1]), high = add_quarters(four[2], four[3]);
    return add_quarters(low, high);
  }

  static Vector add_quarters(Vector a, Vector b) {
    return _mm512_shuffle_f32x4(a, b, 0b10001000) + _mm512_shuffle_f32x4(a, b, 0b11011101);
  }
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
