// The 4-bit and 8-bit code values: the only list of them in the project.
//
// NF4 is the 16 quantiles of N(0, 1) of the QLoRA paper (arXiv 2305.14314, appendix E), FP4 a sign, two exponent and
// one mantissa bit in bitsandbytes' bit order, and the dynamic codebook the 256 signed values that double quantization
// stores absmax in, and the 8-bit optimizer its first moment; the second is in the unsigned one. Everything else here
// (bounds, order of the codes) is computed from the values at compile time.
#pragma once

#include <bit>
#include <cstdint>
#include <limits>

// Functions of the format that kernels use too. nvcc needs --expt-relaxed-constexpr for the constexpr ones.
#ifdef __CUDACC__
#define QLORA_HOST_DEVICE __host__ __device__
#else
#define QLORA_HOST_DEVICE
#endif

namespace qlora {

enum class QuantType : int { NF4 = 0, FP4 = 1 };

constexpr int kNumCodes = 16;
constexpr int kNumDynamicCodes = 256;
constexpr int kNestedBlocksize = 256;

// clang-format off
constexpr float kNf4Values[kNumCodes] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
    -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,
    0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};

constexpr float kFp4Values[kNumCodes] = {
    0.0f, 0.0625f / 12, 8.0f / 12, 12.0f / 12, 4.0f / 12, 6.0f / 12, 2.0f / 12, 3.0f / 12,
    -0.0f, -0.0625f / 12, -8.0f / 12, -12.0f / 12, -4.0f / 12, -6.0f / 12, -2.0f / 12, -3.0f / 12};
// clang-format on

// A 4-bit codebook. The rank of x is the number of bounds below it; the code is that rank's code. Ranks exist because
// FP4's values are not sorted by code, and because its two zeros are one value: ranks run over the distinct values.
struct Codebook {
  float value[kNumCodes];      // by code
  float bound[kNumCodes - 1];  // ascending fp32 midpoints of neighbouring values; +inf where there is no rank
  std::uint8_t code_of_rank[kNumCodes];
};

constexpr Codebook make_codebook(const float (&values)[kNumCodes]) {
  Codebook book{};
  int num_ranks = 0;
  for (int code = 0; code < kNumCodes; ++code) {
    book.value[code] = values[code];
    int rank = 0;
    while (rank < num_ranks && values[book.code_of_rank[rank]] < values[code]) ++rank;
    if (rank < num_ranks && values[book.code_of_rank[rank]] == values[code]) continue;  // FP4's -0.0 is never written
    for (int r = num_ranks++; r > rank; --r) book.code_of_rank[r] = book.code_of_rank[r - 1];
    book.code_of_rank[rank] = static_cast<std::uint8_t>(code);
  }
  for (int rank = 0; rank + 1 < kNumCodes; ++rank) {
    book.bound[rank] = rank + 1 < num_ranks
                           ? (values[book.code_of_rank[rank]] + values[book.code_of_rank[rank + 1]]) / 2
                           : std::numeric_limits<float>::infinity();
  }
  return book;
}

inline constexpr Codebook kCodebooks[] = {make_codebook(kNf4Values), make_codebook(kFp4Values)};

constexpr const Codebook& codebook(QuantType quant_type) { return kCodebooks[static_cast<int>(quant_type)]; }

// An 8-bit codebook: value by code, ascending, and between neighbours their midpoint rounded DOWN to fp32,
// so that for any fp32 x, `x > bound` decides exactly as the real midpoint does and a tie goes to the lower code.
struct DynamicCodebook {
  float value[kNumDynamicCodes];
  float bound[kNumDynamicCodes - 1];
};

constexpr float round_down(double x) {
  const float nearest = static_cast<float>(x);
  if (static_cast<double>(nearest) <= x) return nearest;
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(nearest);
  return std::bit_cast<float>(nearest > 0 ? bits - 1 : bits + 1);
}

inline constexpr float kDecadeEnds[] = {1e-6f, 1e-5f, 1e-4f, 1e-3f, 1e-2f, 1e-1f, 1.0f};
constexpr int kDecades = sizeof kDecadeEnds / sizeof *kDecadeEnds;
inline constexpr float kDecadeRange = 1.0f - 0.1f;  // of a decade that ends at 1

// Seven decades below 1, decade i (from the smallest) cut into 2^i equal cells whose centres are the values; and 0
// and 1. The edges are those of torch.linspace(0.1, 1, cells + 1) on a CPU with FMA: fp32 steps from whichever end is
// nearer. Unsigned: into twice as many cells, and nothing but 0 has the code of 0, as a second moment that became 0
// before the first would leave an update that is divided by eps alone.
constexpr DynamicCodebook make_dynamic_codebook(bool is_signed) {
  DynamicCodebook book{};
  const int zero = is_signed ? 127 : 0;
  int index = 0;
  for (int i = 0; i < kDecades; ++i) {
    const int cells = is_signed ? 1 << i : 2 << i;
    const float step = kDecadeRange / static_cast<float>(cells);
    auto edge = [&](int k) {  // a fused multiply-add: the product of two floats is exact in double
      return k < (cells + 1) / 2 ? static_cast<float>(static_cast<double>(0.1f) + static_cast<double>(step) * k)
                                 : static_cast<float>(1.0 - static_cast<double>(step) * (cells - k));
    };
    for (int k = 0; k < cells; ++k, ++index) {
      const float centre = (edge(k) + edge(k + 1)) / 2 * kDecadeEnds[i];
      book.value[zero + 1 + index] = centre;
      if (is_signed) book.value[zero - 1 - index] = -centre;
    }
  }
  book.value[zero] = 0.0f;
  book.value[kNumDynamicCodes - 1] = 1.0f;
  for (int i = 0; i + 1 < kNumDynamicCodes; ++i) {
    book.bound[i] = round_down((static_cast<double>(book.value[i]) + static_cast<double>(book.value[i + 1])) / 2);
  }
  if (!is_signed) book.bound[0] = 0.0f;
  return book;
}

inline constexpr DynamicCodebook kDynamicCodebook = make_dynamic_codebook(true);
inline constexpr DynamicCodebook kUnsignedCodebook = make_dynamic_codebook(false);

template <bool kSigned>
constexpr const DynamicCodebook& dynamic_codebook() {
  if constexpr (kSigned) return kDynamicCodebook;
  return kUnsignedCodebook;
}

#ifdef __CUDACC__
// The same tables where a kernel can index them; each kernel file gets a copy (2.3 KB).
namespace {
__constant__ Codebook device_codebooks[] = {kCodebooks[0], kCodebooks[1]};
__constant__ DynamicCodebook device_dynamic_codebook = kDynamicCodebook;
}  // namespace
#endif

static_assert(codebook(QuantType::NF4).code_of_rank[7] == 7 && codebook(QuantType::NF4).value[7] == 0.0f);
static_assert(codebook(QuantType::FP4).code_of_rank[7] == 0 && codebook(QuantType::FP4).bound[14] > 1.0f);
static_assert(kDynamicCodebook.value[127] == 0.0f && kDynamicCodebook.value[255] == 1.0f);
static_assert(kUnsignedCodebook.value[0] == 0.0f && kUnsignedCodebook.value[254] < 1.0f);

}  // namespace qlora
