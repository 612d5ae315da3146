// dequantize_4bit on the CPU. It computes a range of the work and holds no threads.
#pragma once

#include <cstdint>

#include "../codec.h"

namespace qlora::cpu {

// out[i - begin] = round_to_dtype(value[code i] * absmax of i's block), for elements [begin, end). past_caches: written
// to memory at once, where vector kernels can. A line that is written into a cache is read from memory before.
void dequantize_4bit(const Packed4bit& w, std::int64_t begin, std::int64_t end, DType dtype, void* out,
                     bool past_caches = false);

// The kernels: whole blocks [begin, end) only.
void dequantize_4bit_avx2(const Packed4bit& w, std::int64_t begin, std::int64_t end, DType dtype, void* out,
                          bool past_caches);
void dequantize_4bit_avx512(const Packed4bit& w, std::int64_t begin, std::int64_t end, DType dtype, void* out,
                            bool past_caches);

}  // namespace qlora::cpu
