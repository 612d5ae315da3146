// The table that decodes a byte into two codes at once: the heart of the fused kernels.
//
// Row b of the table holds the codes of byte b's high and low nibble, rounded to T, as one 32-bit pair: the element of
// the lower index in the lower half, which is just how mma wants them. The pair is written 32 times, once for each
// lane's bank, so that no two lanes ever conflict. Rows are 256 bytes apart: the byte shifted left by 8 is its row's
// address, and one byte permutation makes the whole address, [4 lane, byte, 0, 0]. Two instructions decode two weights.
//
// The rows' other 128 bytes, the slots, are free: the kernels stage the small operand of the product there.
#pragma once

#include "../codec.h"

namespace qlora::cuda {

constexpr int kTableBytes = 256 * 256;
constexpr int kSlots = 256;
constexpr int kSlotBytes = 128;
constexpr int kSlotStride = 256;

__device__ __forceinline__ char* slot_address(char* table, int slot) { return table + slot * kSlotStride + kSlotBytes; }

template <typename T>
__device__ std::uint32_t table_code(QuantType quant_type, int code) {
  return round_code<T>(quant_type, code, device_codebooks[static_cast<int>(quant_type)].value[code]).bits;
}

// By all threads of the CTA; ends without a barrier.
template <typename T>
__device__ void fill_pair_table(char* table, QuantType quant_type) {
  for (int i = threadIdx.x; i < 256 * 8; i += blockDim.x) {
    const int byte = i / 8;
    const std::uint32_t pair = table_code<T>(quant_type, byte >> 4) | table_code<T>(quant_type, byte & 0xf) << 16;
    *reinterpret_cast<uint4*>(table + byte * 256 + i % 8 * 16) = make_uint4(pair, pair, pair, pair);
  }
}

// The pair of byte kByte of word. lane4: four times the lane.
template <int kByte>
__device__ __forceinline__ std::uint32_t lookup_pair(const char* table, std::uint32_t word, std::uint32_t lane4) {
  return *reinterpret_cast<const std::uint32_t*>(table + __byte_perm(word, lane4, 0x5504 | kByte << 4));
}

}  // namespace qlora::cuda
