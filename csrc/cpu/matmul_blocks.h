// How matmul is cut into blocks, and the memory that takes.
#pragma once

#include "matmul.h"

namespace qlora::cpu {

constexpr std::int64_t kDepth = 256;       // of the reduction
constexpr std::int64_t kMaxRows = 528;     // of x, multiples of row_step: what a decoded weight is used for at most
constexpr std::int64_t kMaxColumns = 256;  // of out, for which a block is staged at a time, if it is

// Of fewer rows there is room for more columns, whose weights lie side by side. `rows` is a multiple of row_step.
constexpr std::int64_t columns_at_once(std::int64_t rows) { return kMaxRows / rows * kMaxColumns; }

// A block of the 4-bit weight, copied to one place: its rows are so far apart that they would push each other out of
// the cache. Bytes are as in the weight, [W's rows][kStagedBytes], again at a stride that is no power of two; absmax is
// decoded, per kStep of W's columns.
static_assert(kDepth == kMaxColumns);  // W's rows are the panel's rows or its columns
constexpr std::int64_t kStagedBytes = kDepth / 2 + 64;
constexpr std::int64_t kStep = kMinBlocksize;

// The memory of one thread.
struct MatmulScratch {
  float* panel;          // [kDepth][panel's width], or as many in the kernel's order; or 4 of bf16
  float* sums;           // [panels][rows][panel's width], kSums in all
  float* beside;         // likewise: what is added to them later
  float* absmax;         // staged [W's columns / kStep][W's rows], of which there are at most kDepth
  std::uint8_t* packed;  // staged

  static constexpr std::int64_t kPanelFloats = 2 * kDepth * kMatmulColumnBoundary, kSums = kMaxRows * kMaxColumns;
  static constexpr std::int64_t kAbsmaxFloats = kDepth / kStep * kDepth;
  static constexpr std::int64_t kFloats = kPanelFloats + 2 * kSums + kAbsmaxFloats + kDepth * kStagedBytes / 4;

  explicit MatmulScratch(float* memory)
      : panel(memory),
        sums(panel + kPanelFloats),
        beside(sums + kSums),
        absmax(beside + kSums),
        packed(reinterpret_cast<std::uint8_t*>(absmax + kAbsmaxFloats)) {}
};

// The portable kernel is not for x86-64: where that has no AVX2, torch's products are faster, as 16 registers are few.
// (Tests under sanitizers, which run on x86-64, define it.)
#if !defined(__x86_64__) && !defined(QLORA_EXT_PORTABLE_MATMUL)
#define QLORA_EXT_PORTABLE_MATMUL
#endif

// The kernels of one instruction set.
struct MatmulKernel {
  std::int64_t row_boundary;          // a multiple of row_step
  std::int64_t row_step, depth_step;  // rows of the arranged x, and floats of a row, are multiples of these
  std::int64_t per_step;              // elements of the reduction that lie in a float
  void (*arrange)(const Matmul& product, const MatmulRows& rows, std::int64_t begin, std::int64_t end);
  void (*multiply)(const Matmul& product, const MatmulRows& rows, const Rectangle& rectangle,
                   const MatmulScratch& scratch);
};

extern const MatmulKernel matmul_portable, matmul_avx2, matmul_avx512, matmul_avx512_bf16, matmul_amx;

}  // namespace qlora::cpu
