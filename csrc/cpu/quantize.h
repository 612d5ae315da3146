// quantize_4bit and quantize_absmax on the CPU. Each computes a range of the work and holds no threads: the caller
// splits [0, count) as it likes, the bytes do not depend on the split.
#pragma once

#include <cstdint>

#include "../codec.h"

namespace qlora::cpu {

// Blocks [begin, end) of the n elements of weight: packed[i / 2] and absmax[block].
void quantize_4bit(const void* weight, DType dtype, std::int64_t n, std::int64_t blocksize, QuantType quant_type,
                   std::int64_t begin, std::int64_t end, std::uint8_t* packed, float* absmax);

// The sums of groups [begin, end) of 256 of absmax[n], in order, in fp64.
void sum_absmax(const float* absmax, std::int64_t n, std::int64_t begin, std::int64_t end, double* sums);

// The mean of absmax[n] as the format defines it: those sums of all groups added up in order.
float absmax_offset(const double* sums, std::int64_t groups, std::int64_t n);

// Groups [begin, end) of 256 of absmax[n]: codes[i] and nested_absmax[group].
void quantize_absmax(const float* absmax, std::int64_t n, float offset, std::int64_t begin, std::int64_t end,
                     std::uint8_t* codes, float* nested_absmax);

// The kernels: whole blocks or groups [begin, end) only; the functions above see to a last, shorter one.
void quantize_4bit_avx2(const void* weight, DType dtype, std::int64_t blocksize, QuantType quant_type,
                        std::int64_t begin, std::int64_t end, std::uint8_t* packed, float* absmax);
void quantize_4bit_avx512(const void* weight, DType dtype, std::int64_t blocksize, QuantType quant_type,
                          std::int64_t begin, std::int64_t end, std::uint8_t* packed, float* absmax);
void quantize_absmax_portable(const float* absmax, float offset, std::int64_t begin, std::int64_t end,
                              std::uint8_t* codes, float* nested_absmax);
void quantize_absmax_avx2(const float* absmax, float offset, std::int64_t begin, std::int64_t end, std::uint8_t* codes,
                          float* nested_absmax);
void quantize_absmax_avx512(const float* absmax, float offset, std::int64_t begin, std::int64_t end,
                            std::uint8_t* codes, float* nested_absmax);

}  // namespace qlora::cpu
