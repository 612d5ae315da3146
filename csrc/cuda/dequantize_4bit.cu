// dequantize_4bit: out[i] = round_to_dtype(value[code i] * absmax of i's block), one rounding; the 8-bit absmax of
// double quantization is decoded on the way.
//
// The slice is a matrix whose rows are cut into strips, one a warp. Each lane takes 4 groups of a strip. A group is 16
// bytes of out, or, where the slice or the pointers do not allow that, one weight.
#include "../launch.h"
#include "pairs.cuh"

namespace qlora::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kGroups = 4;  // of a lane: so many loads are in flight

// out[rows, width] of the elements first + row * row_stride + column.
struct Region {
  std::int64_t first, rows, width, row_stride;
};

// The codes of a group: byte j of them in bits 8 j, as they are packed. Of one weight: its code.
template <int kGroup>
__device__ std::uint32_t load_codes(const std::uint8_t* packed, std::int64_t element) {
  if constexpr (kGroup == 1) return unpack(packed, element);
  const std::uint8_t* bytes = packed + element / 2;
  if constexpr (kGroup == 4) return *reinterpret_cast<const std::uint16_t*>(bytes);
  if constexpr (kGroup == 8) return *reinterpret_cast<const std::uint32_t*>(bytes);
}

// absmax[j] of element + j * step, if valid[j]. All loads come first, so that none waits for another.
template <int kCount>
__device__ void load_absmax(const Packed4bit& w, int blocksize_log2, std::int64_t element, int step,
                            const bool (&valid)[kCount], float (&absmax)[kCount]) {
  const std::int64_t block = element >> blocksize_log2;
  const int place_in_block = static_cast<int>(element & ((1 << blocksize_log2) - 1));
  int next[kCount];  // blocks from `block` on
#pragma unroll
  for (int j = 0; j < kCount; ++j) next[j] = (place_in_block + j * step) >> blocksize_log2;

  if (w.nested_absmax == nullptr) {
    const float* values = static_cast<const float*>(w.absmax) + block;
#pragma unroll
    for (int j = 0; j < kCount; ++j) absmax[j] = valid[j] ? values[next[j]] : 0.0f;
    return;
  }
  const float offset = *w.nested_offset;
  const std::uint8_t* codes = static_cast<const std::uint8_t*>(w.absmax) + block;
  const float* nested_absmax = w.nested_absmax + block / kNestedBlocksize;
  const int place_in_group = static_cast<int>(block % kNestedBlocksize);
  int code[kCount];
  float nested[kCount];
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    code[j] = valid[j] ? codes[next[j]] : 0;
    nested[j] = valid[j] ? nested_absmax[(place_in_group + next[j]) / kNestedBlocksize] : 0.0f;
  }
  // From constant memory: the lanes ask for one address a block, at most 8 at a time, and all together for no more than
  // a copy of the table would.
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    absmax[j] = decode_dynamic(device_dynamic_codebook.value[code[j]], nested[j], offset);
  }
}

template <typename T>
__device__ void store(const float (&x)[1], T* out) {
  *out = round_to<T>(x[0]);
}

// __stwb: some of the plain stores of 16 bytes nvcc makes into four.
__device__ void store(const float (&x)[4], float* out) {
  __stwb(reinterpret_cast<float4*>(out), make_float4(x[0], x[1], x[2], x[3]));
}

template <typename T>
__device__ void store(const float (&x)[8], T* out) {
  __stwb(reinterpret_cast<uint4*>(out), make_uint4(pack_pair(x[0], x[1], T{}), pack_pair(x[2], x[3], T{}),
                                                   pack_pair(x[4], x[5], T{}), pack_pair(x[6], x[7], T{})));
}

template <typename T, int kGroup>
__global__ void __launch_bounds__(kThreads)
    dequantize_4bit_kernel(Packed4bit w, int blocksize_log2, Region region, T* out) {
  // 16 words lie in 16 banks: lanes that look up different codes do not wait for each other.
  __shared__ float value_of[kNumCodes];
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < kNumCodes) value_of[thread] = device_codebooks[static_cast<int>(w.quant_type)].value[thread];

  constexpr int kStep = kWarp * kGroup, kStrip = kGroups * kStep;
  const int tail = static_cast<int>(region.width % kGroup);  // not 0 only in a single row
  const std::int64_t width = region.width - tail;
  const std::int64_t strips = (width + kStrip - 1) / kStrip;
  const std::int64_t strip = std::int64_t{blockIdx.x} * (kThreads / kWarp) + thread / kWarp;
  const std::int64_t row = strip / strips;  // in 32 bits, where the numbers allow it: nvcc's code looks
  const std::int64_t column = (strip - row * strips) * kStrip + thread % kWarp * kGroup;
  const std::int64_t element = region.first + row * region.row_stride + column;
  const int left = row < region.rows ? static_cast<int>(min(width - column, std::int64_t{kStrip})) : 0;
  std::uint32_t codes[kGroups];
  bool valid[kGroups];
#pragma unroll
  for (int j = 0; j < kGroups; ++j) {
    valid[j] = j * kStep < left;
    codes[j] = valid[j] ? load_codes<kGroup>(w.packed, element + j * kStep) : 0;
  }
  __syncthreads();
  float absmax[kGroups];
  load_absmax(w, blocksize_log2, element, kStep, valid, absmax);

  T* place = out + row * region.width + column;
#pragma unroll
  for (int j = 0; j < kGroups; ++j) {
    if (!valid[j]) break;
    float x[kGroup];
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const int shift = kGroup == 1 ? 0 : nibble_shift(i);
      x[i] = value_of[codes[j] >> shift & 0xfu] * absmax[j];
    }
    store(x, place + j * kStep);
  }

  if (blockIdx.x == 0 && thread < tail) {
    const std::int64_t i = width + thread;
    float tail_absmax[1];
    load_absmax(w, blocksize_log2, region.first + i, 0, {true}, tail_absmax);
    store({value_of[unpack(w.packed, region.first + i)] * tail_absmax[0]}, out + i);
  }
}

// --- launcher -----------------------------------------------------------------------------------------------------

template <typename T, int kGroup>
cudaError_t launch(const Packed4bit& w, const Region& region, T* out, cudaStream_t stream) {
  constexpr std::int64_t kStrip = kGroups * kWarp * kGroup, kPerCta = kThreads / kWarp;
  const std::int64_t strips = region.rows * ceil_div(region.width - region.width % kGroup, kStrip);
  const auto ctas = static_cast<unsigned>(ceil_div(strips, kPerCta));
  const int blocksize_log2 = std::countr_zero(static_cast<std::uint64_t>(w.blocksize));
  dequantize_4bit_kernel<T, kGroup><<<ctas, kThreads, 0, stream>>>(w, blocksize_log2, region, out);
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch(const Packed4bit& w, std::int64_t K, const Slice& slice, void* out, cudaStream_t stream) {
  Region region{slice.row_begin * K + slice.column_begin, slice.row_end - slice.row_begin,
                slice.column_end - slice.column_begin, K};
  if (region.rows == 0 || region.width == 0) return cudaSuccess;
  if (region.width == K) region = {region.first, 1, region.rows * K, 0};  // whole rows: one run, whatever K is

  constexpr int kGroup = 16 / sizeof(T);
  const auto multiple = [](std::int64_t x) { return x % kGroup == 0; };
  const bool groups = region.width >= kGroup && multiple(region.first) &&
                      (region.rows == 1 || (multiple(region.row_stride) && multiple(region.width))) &&
                      reinterpret_cast<std::uintptr_t>(out) % 16 == 0 &&
                      reinterpret_cast<std::uintptr_t>(w.packed) % (kGroup / 2) == 0;
  auto* values = static_cast<T*>(out);
  return groups ? launch<T, kGroup>(w, region, values, stream) : launch<T, 1>(w, region, values, stream);
}

}  // namespace

cudaError_t launch_dequantize_4bit(const Packed4bit& w, std::int64_t K, const Slice& slice, DType dtype, void* out,
                                   cudaStream_t stream) {
  switch (dtype) {
    case DType::Float32:
      return launch<float>(w, K, slice, out, stream);
    case DType::Float16:
      return launch<Half>(w, K, slice, out, stream);
    case DType::BFloat16:
      return launch<BFloat16>(w, K, slice, out, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace qlora::cuda
