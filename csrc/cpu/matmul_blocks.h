// How matmul is cut into blocks, and the memory that takes.
#pragma once

#include "matmul.h"

namespace qlora::cpu {

constexpr std::int64_t kDepth = 256;       // of the reduction
constexpr std::int64_t kMaxRows = 512;     // of x: what a decoded weight is used for
constexpr std::int64_t kMaxColumns = 256;  // of out, whose weights are staged at a time
// Strides in floats. No powers of two: rows would meet in a few sets of the cache.
constexpr std::int64_t kXStride = kDepth + 16;
constexpr std::int64_t kSumStride = kMaxColumns + 16;

// A block of the 4-bit weight, copied to one place: its rows are so far apart that they would push each other out of
// the cache. Bytes are as in the weight, [W's rows][kStagedBytes]; absmax is decoded, per kStep of W's columns.
constexpr std::int64_t kStagedBytes = kDepth / 2;
constexpr std::int64_t kStep = 32;

// The memory of one thread.
struct MatmulScratch {
  float* x;              // [kMaxRows][kXStride]
  float* panel;          // [kDepth][panel's width]
  float* sums;           // [blocks of kMaxColumns][rows][kSumStride], kMaxRows * kSumStride in all
  float* masked;         // likewise: a term before its out_mask
  float* absmax;         // staged [W's columns / kStep][W's rows], of which there are at most kDepth
  std::uint8_t* packed;  // staged

  static constexpr std::int64_t kPanelFloats = kDepth * kMatmulColumnBorder;
  static constexpr std::int64_t kAbsmaxFloats = kDepth / kStep * kDepth;
  static constexpr std::int64_t kFloats =
      kMaxRows * (kXStride + 2 * kSumStride) + kPanelFloats + kAbsmaxFloats + kDepth * kStagedBytes / 4;

  explicit MatmulScratch(float* memory)
      : x(memory),
        panel(x + kMaxRows * kXStride),
        sums(panel + kPanelFloats),
        masked(sums + kMaxRows * kSumStride),
        absmax(masked + kMaxRows * kSumStride),
        packed(reinterpret_cast<std::uint8_t*>(absmax + kAbsmaxFloats)) {}
};

void matmul_avx2(const Matmul& product, const Rectangle& rectangle, const MatmulScratch& scratch);
void matmul_avx512(const Matmul& product, const Rectangle& rectangle, const MatmulScratch& scratch);
void matmul_avx512_bf16(const Matmul& product, const Rectangle& rectangle, const MatmulScratch& scratch);

}  // namespace qlora::cpu
