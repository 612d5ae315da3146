// linear_4bit for few rows, AVX2 and FMA: 64 weights of 32 bytes at a time, multiplied in fp32.
#include "linear_4bit.h"

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

#include "linear_4bit_avx2.h"

namespace qlora::cpu {
namespace {

// The values of 32 codes, one a byte: expanded, value i of vector q is that of byte place(q, i).
struct CodesFp32 {
  Planes planes;

  explicit CodesFp32(QuantType quant_type) : planes(quant_type) {}

  static constexpr int place(int q, int i) { return 16 * (i / 4) + 4 * q + i % 4; }

  void expand(__m256i codes, __m256 (&values)[4]) const { cpu::expand(planes, codes, values); }
};

// In bf16, as x is: half of the lookups.
struct CodesBf16 {
  __m256i low, high;

  explicit CodesBf16(QuantType quant_type) {
    std::uint8_t bytes[2][kNumCodes];
    for (int code = 0; code < kNumCodes; ++code) {
      const unsigned bits = round_code<BFloat16>(quant_type, code, codebook(quant_type).value[code]).bits;
      bytes[0][code] = static_cast<std::uint8_t>(bits);
      bytes[1][code] = static_cast<std::uint8_t>(bits >> 8);
    }
    low = load_plane(bytes[0]);
    high = load_plane(bytes[1]);
  }

  static constexpr int place(int q, int i) { return 16 * (i / 4) + 8 * (q / 2) + 2 * (i % 4) + q % 2; }

  void expand(__m256i codes, __m256 (&values)[4]) const {
    const __m256i lows = _mm256_shuffle_epi8(low, codes), highs = _mm256_shuffle_epi8(high, codes);
    const __m256i words[2] = {_mm256_unpacklo_epi8(lows, highs), _mm256_unpackhi_epi8(lows, highs)};
    for (int i = 0; i < 2; ++i) {
      values[2 * i] = _mm256_castsi256_ps(_mm256_slli_epi32(words[i], 16));
      values[2 * i + 1] = _mm256_castsi256_ps(_mm256_and_si256(words[i], _mm256_set1_epi32(-0x10000)));
    }
  }
};

template <typename Codes>
struct Avx2 : AbsmaxInTurn {
  static constexpr std::int64_t kChunk = 64;
  static constexpr int kMostRows = 8;
  static constexpr int kRowsOfW = 1;
  using Element = float;
  using Lanes = LanesAvx2;
  using Vector = __m256;

  Codes codes;

  explicit Avx2(QuantType quant_type) : codes(quant_type) {}

  // First those of the bytes' high nibbles, then those of the low ones.
  static constexpr int element(int i) { return 2 * Codes::place(i / 8 % 4, i % 8) + i / 32; }

  template <int kRows>
  void multiply(const std::uint8_t* packed, std::int64_t, const float* x, Vector (&products)[kRowsOfW][kRows]) const {
    const __m256i nibble = _mm256_set1_epi8(0xf);
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed));
    __m256 high[4], low[4];
    codes.expand(_mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble), high);
    codes.expand(_mm256_and_si256(bytes, nibble), low);
    for (int m = 0; m < kRows; ++m, x += kChunk) {
      Vector even = _mm256_mul_ps(high[0], _mm256_load_ps(x));
      Vector odd = _mm256_mul_ps(low[0], _mm256_load_ps(x + 32));
      for (int q = 1; q < 4; ++q) {
        even = _mm256_fmadd_ps(high[q], _mm256_load_ps(x + 8 * q), even);
        odd = _mm256_fmadd_ps(low[q], _mm256_load_ps(x + 32 + 8 * q), odd);
      }
      products[0][m] = _mm256_add_ps(even, odd);
    }
  }

  // Many rows share what it takes to scale the weights, and need no registers for products then.
  template <int kRows>
    requires(kRows > 5)
  void multiply_scaled(const std::uint8_t* packed, Vector scale, const float* x, Vector (&sum)[kRows]) const {
    const __m256i nibble = _mm256_set1_epi8(0xf);
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed));
    const __m256i halves[2] = {_mm256_srli_epi16(bytes, 4), bytes};
    for (const __m256i half : halves) {
      __m256 weights[4];
      codes.expand(_mm256_and_si256(half, nibble), weights);
      for (__m256& w : weights) w = _mm256_mul_ps(w, scale);
      for (int m = 0; m < kRows; ++m) {
        for (int q = 0; q < 4; ++q) {
          sum[m] = _mm256_fmadd_ps(weights[q], _mm256_load_ps(x + m * kChunk + 8 * q), sum[m]);
        }
      }
      x += kChunk / 2;
    }
  }

  static Vector multiply_add(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }

  static void copy_bytes(const std::uint8_t* from, std::int64_t, std::uint8_t (&chunk)[kChunk / 2]) {  // a run of 32
    const __m128i run = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(chunk), _mm256_zextsi128_si256(run));
  }

  // The total of each of 8 vectors: pairs of vectors become one of twice as many, shorter sums, three times.
  static Vector add_lanes(const Vector* x) {
    Vector quarters[4], halves[2];
    for (int i = 0; i < 4; ++i) quarters[i] = _mm256_hadd_ps(x[2 * i], x[2 * i + 1]);
    for (int i = 0; i < 2; ++i) halves[i] = _mm256_hadd_ps(quarters[2 * i], quarters[2 * i + 1]);
    return _mm256_add_ps(_mm256_permute2f128_ps(halves[0], halves[1], 0x20),
                         _mm256_permute2f128_ps(halves[0], halves[1], 0x31));
  }
};

}  // namespace

const FewRowsKernel& few_rows_avx2(DType dtype) {
  return dtype == DType::BFloat16 ? kAlongRows<Avx2<CodesBf16>> : kAlongRows<Avx2<CodesFp32>>;
}

}  // namespace qlora::cpu

#pragma GCC pop_options
#endif
