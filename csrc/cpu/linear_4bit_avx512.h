// What linear_4bit's AVX512 kernels share: sums of 16 lanes, absmax, which of a chunk's absmax a lane takes (that of
// the run of 32 weights that kRunOfLane names), and those of bf16 their codes. A file of kernels includes this inside
// its target region, after dynamic_lookup_avx512.h or its twin for VBMI.
#include "linear_4bit_loops.h"
#include "simd_avx512.h"

namespace qlora::cpu {
namespace {

struct SumsAvx512 {
  using Vector = __m512;

  static Vector multiply_add(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
  static Vector add_lanes(const Vector* x) { return across_lanes(x, Sum{}); }

  // Of `count` blocks from `first` on; writes up to a multiple of kLookedUp.
  static void decode_absmax(const Packed4bit& w, std::int64_t first, std::int64_t count, float* absmax) {
    if (w.nested_absmax == nullptr) {
      const float* from = static_cast<const float*>(w.absmax) + first;
      for (std::int64_t i = 0; i < count; i += 16)
        _mm512_storeu_si512(absmax + i, load_bytes(from + i, 4 * (count - i)));
      return;
    }
    const __m512 offset = _mm512_set1_ps(*w.nested_offset);
    for (std::int64_t i = 0; i < count; i += kLookedUp) {
      const std::uint64_t present = first_bits(smaller(count - i, kLookedUp));
      const __m512i codes = _mm512_maskz_loadu_epi8(present, static_cast<const std::uint8_t*>(w.absmax) + first + i);
      __m512 values[kLookedUp / 16];
      look_up_values<kDynamicCodebook>(codes, values);
      // Of one group, or of two.
      const std::int64_t group = (first + i) / kNestedBlocksize, rest = (group + 1) * kNestedBlocksize - (first + i);
      const std::uint64_t of_next = present & ~first_bits(rest);
      const __m512 scale = _mm512_set1_ps(w.nested_absmax[group]);
      const __m512 next = _mm512_set1_ps(w.nested_absmax[of_next == 0 ? group : group + 1]);
      for (int j = 0; j < kLookedUp; j += 16) {
        const __m512 nested = _mm512_mask_blend_ps(static_cast<__mmask16>(of_next >> j), scale, next);
        const __m512 product = _mm512_mul_ps(values[j / 16], nested);
        _mm512_storeu_ps(absmax + i + j, _mm512_maskz_add_ps(static_cast<__mmask16>(present >> j), product, offset));
      }
    }
  }

  template <std::size_t kSize>
  static void copy_bytes(const std::uint8_t* from, std::int64_t count, std::uint8_t (&chunk)[kSize]) {
    for (std::size_t i = 0; i < kSize; i += 64) {
      _mm512_storeu_si512(chunk + i, load_bytes(from + i, count - static_cast<std::int64_t>(i)));
    }
  }
};

// The codes in 16 bits, twice: of an index of 5 bits the highest does not count.
inline __m512i codes_in_bf16(QuantType quant_type) {
  std::uint16_t words[2 * kNumCodes];
  for (int i = 0; i < 2 * kNumCodes; ++i) {
    const int code = i % kNumCodes;
    words[i] = round_code<BFloat16>(quant_type, code, codebook(quant_type).value[code]).bits;
  }
  return _mm512_loadu_si512(words);
}

// For chunks of 128 weights that lie in the register as in memory.
constexpr int run_of_lane(int lane) { return lane / 4; }

template <int (*kRunOfLane)(int) = run_of_lane>
struct LanesAvx512 {
  __m512i run, block;

  explicit LanesAvx512(std::int64_t blocksize) {
    std::int32_t runs[16], blocks[16];
    for (int lane = 0; lane < 16; ++lane) {
      runs[lane] = kRunOfLane(lane);
      blocks[lane] = static_cast<std::int32_t>(runs[lane] * kRun / blocksize);
    }
    run = _mm512_loadu_si512(runs);
    block = _mm512_loadu_si512(blocks);
  }

  __m512 scales(const float* absmax) const {
    return _mm512_permutexvar_ps(block, _mm512_castps256_ps512(_mm256_loadu_ps(absmax)));
  }

  __m512 scales(const float* absmax, std::int64_t runs) const {
    const __mmask16 present = _mm512_cmpgt_epi32_mask(_mm512_set1_epi32(static_cast<std::int32_t>(runs)), run);
    return _mm512_maskz_mov_ps(present, scales(absmax));
  }
};

}  // namespace
}  // namespace qlora::cpu
