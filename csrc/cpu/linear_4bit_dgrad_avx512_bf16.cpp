// linear_4bit_dgrad for few rows, AVX512_BF16 and VBMI: 128 columns of W, 64 bytes of a row, at a time, in pairs of
// bf16 along the reduction: two rows' weights of a column side by side. The 16 that a block may have of a row are made
// once, rounded as dequantize_4bit does (but for subnormals: of weights, grad and sums they are 0 here), and looked up
// by codes, one of 64: two rows' of two blocks. Up to three rows of grad meet weights in registers, more meet those of
// some rows of W in the L1.
#include "linear_4bit_dgrad.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include "linear_4bit.h"
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi,avx2,fma,f16c")

#include "dynamic_lookup_avx512_vbmi.h"
#include "linear_4bit_avx512.h"
#include "linear_4bit_dgrad_loops.h"

namespace qlora::cpu {
namespace {

struct DgradAvx512Bf16 : SumsAvx512 {
  static constexpr int kMostRows = 32;
  static constexpr std::int64_t kMostSums = 256;
  static constexpr std::int64_t kStrip = 2048;
  static constexpr std::int64_t kChunk = 128;
  static constexpr std::int64_t kRowsOfW = 64;
  static constexpr int kVectors = 8;  // the i-th has the i-th codes of the chunk's dwords
  using Element = BFloat16;
  using Chunk = Vector[kVectors];

  const Packed4bit& of;

  explicit DgradAvx512Bf16(const Packed4bit& w) : of(w) {}

  static constexpr int column(int i) { return i % 16 * kVectors + (i / 16 ^ 1); }  // the low nibble is the odd element

  void add_rows(const ChunkOfW& w, const BFloat16* grad, std::int64_t stride, std::int64_t M, Chunk* sums) const {
    if (of.blocksize == kRun) {
      add_rows_in_blocks<4>(w, grad, stride, M, sums);
    } else {
      add_rows_in_blocks<2>(w, grad, stride, M, sums);
    }
  }

 private:
  static constexpr int kAtOnce = 3;  // rows of grad whose sums are in registers

  // Hands out the weights of two rows of a chunk of W, which has so many blocks at most.
  template <int kBlocks>
  struct Decoder {
    ChunkOfW w;
    __m512 codebook;
    __m512i code, place;  // what an index of a lookup has of the codes, and beside them
    std::int64_t block[kBlocks];
    std::uint64_t present;

    Decoder(const Packed4bit& of, const ChunkOfW& chunk)
        : w(chunk),
          codebook(_mm512_loadu_ps(qlora::codebook(of.quant_type).value)),
          code(_mm512_set1_epi16(0xf)),
          present(first_bits(chunk.count / 2)) {
      for (int i = 0; i < kBlocks; ++i) block[i] = i * (kChunk / kBlocks) / of.blocksize;
      const __m512i second_row = _mm512_set1_epi32(0x100000), second_block = _mm512_set1_epi16(0x20);
      place = _mm512_mask_or_epi32(second_row, kBlocks == 4 ? 0xf0f0 : 0xff00, second_row, second_block);
    }

    template <typename Handle>
    [[gnu::always_inline]] void operator()(std::int64_t row, Handle&& handle) const {
      const bool last = row + 1 == w.rows;  // of an odd number, after which comes one with an absmax of 0
      const std::uint8_t* packed = w.packed + row * w.stride;
      const float* absmax = w.absmax + row * w.absmax_stride;
      const auto load = [&](std::int64_t i) __attribute__((always_inline)) {
        __builtin_prefetch(packed + (i + kRowsOfW) * w.stride, 0, 2);
        // By a mask, a line that is not in the L1 takes longer to come.
        return w.count == kChunk ? _mm512_loadu_si512(packed + i * w.stride)
                                 : _mm512_maskz_loadu_epi8(present, packed + i * w.stride);
      };
      const __m512i first = load(0), second = last ? first : load(1);
      __m512i weights[kBlocks];  // words 0 to 15 are the first row's
      for (int i = 0; i < kBlocks; ++i) {
        const float of_second = last ? 0.0f : absmax[w.absmax_stride + block[i]];
        weights[i] = (__m512i)_mm512_cvtne2ps_pbh(codebook * _mm512_set1_ps(of_second),
                                                  codebook * _mm512_set1_ps(absmax[block[i]]));
      }
      // Of each dword the low word is the first row's.
      constexpr __mmask32 kHigh = 0xaaaaaaaa;
      const __m512i words[2] = {_mm512_mask_blend_epi16(kHigh, first, _mm512_slli_epi32(second, 16)),
                                _mm512_mask_blend_epi16(kHigh, _mm512_srli_epi32(first, 16), second)};
#pragma GCC unroll 8
      for (int i = 0; i < kVectors; ++i) {
        const __m512i codes = _mm512_srli_epi16(words[i / 4], static_cast<unsigned>(i % 4 * 4));
        const __m512i index = _mm512_ternarylogic_epi32(codes, code, place, 0xea);  // codes & code | place
        __m512i pairs = _mm512_permutex2var_epi16(weights[0], index, weights[1]);
        if constexpr (kBlocks == 4) {
          pairs = _mm512_mask_mov_epi32(pairs, 0xff00, _mm512_permutex2var_epi16(weights[2], index, weights[3]));
        }
        handle(i, pairs);
      }
    }
  };

  // Hands out those that a decoder has left in memory.
  struct Decoded {
    const __m512i (*pairs)[kVectors];

    template <typename Handle>
    [[gnu::always_inline]] void operator()(std::int64_t row, Handle&& handle) const {
#pragma GCC unroll 8
      for (int i = 0; i < kVectors; ++i) handle(i, pairs[row / 2][i]);
    }
  };

  template <int kBlocks>
  void add_rows_in_blocks(const ChunkOfW& w, const BFloat16* grad, std::int64_t stride, std::int64_t M,
                          Chunk* sums) const {
    const Decoder<kBlocks> decoder(of, w);
    if (M <= kAtOnce) return multiply(decoder, w.rows, grad, stride, M, sums);
    __m512i pairs[kRowsOfW / 2][kVectors];
    decode(decoder, pairs);
    each_group(M, kAtOnce, [&](std::int64_t m, std::int64_t rows) {
      multiply(Decoded{pairs}, w.rows, grad + m * stride, stride, rows, sums + m);
    });
  }

  template <int kBlocks>
  [[gnu::noinline]] static void decode(const Decoder<kBlocks>& from, __m512i (*pairs)[kVectors]) {
    const Decoder<kBlocks> decoder = from;  // in registers
    for (std::int64_t row = 0; row < decoder.w.rows; row += 2, ++pairs) {
      decoder(row, [&](int i, __m512i weights) __attribute__((always_inline)) { (*pairs)[i] = weights; });
    }
  }

  template <typename Weights>
  static void multiply(const Weights& weights, std::int64_t rows_of_w, const BFloat16* grad, std::int64_t stride,
                       std::int64_t M, Chunk* sums) {
    switch (M) {
      case 1:
        return multiply_rows<1>(weights, rows_of_w, grad, stride, sums);
      case 2:
        return multiply_rows<2>(weights, rows_of_w, grad, stride, sums);
      default:
        return multiply_rows<kAtOnce>(weights, rows_of_w, grad, stride, sums);
    }
  }

  // Rows of grad, so far apart, times all rows of W, onto the sums.
  template <int kRows, typename Weights>
  [[gnu::noinline]] static void multiply_rows(const Weights& from, std::int64_t rows_of_w, const BFloat16* grad,
                                              std::int64_t stride, Chunk* sums) {
    const Weights weights = from;  // in registers
    Vector sum[kRows][kVectors];
    const auto each = [&](auto&& body) __attribute__((always_inline)) {
#pragma GCC unroll 3
      for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
        for (int i = 0; i < kVectors; ++i) body(m, i);
      }
    };
    each([&](int m, int i) { sum[m][i] = _mm512_setzero_ps(); });  // no chain of additions as long as N
    for (std::int64_t row = 0; row < rows_of_w; row += 2) {
      __m512bh g[kRows];
      for (int m = 0; m < kRows; ++m) {
        std::int32_t pair;
        __builtin_memcpy(&pair, grad + m * stride + row, sizeof pair);
        g[m] = (__m512bh)_mm512_set1_epi32(pair);
      }
      weights(row, [&](int i, __m512i pairs) __attribute__((always_inline)) {
#pragma GCC unroll 3
        for (int m = 0; m < kRows; ++m) sum[m][i] = _mm512_dpbf16_ps(sum[m][i], (__m512bh)pairs, g[m]);
      });
    }
    each([&](int m, int i) { sums[m][i] += sum[m][i]; });
  }
};

}  // namespace

void linear_4bit_dgrad_avx512_bf16(const FewRowsDgrad& product, std::int64_t begin, std::int64_t end) {
  few_rows_dgrad<DgradAvx512Bf16>(product, begin, end);
}

}  // namespace qlora::cpu

#pragma GCC pop_options
#endif
