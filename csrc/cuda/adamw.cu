// AdamW for all the slices of a call, whole parameters' or those of many pages, in one launch. What is computed, and in
// which roundings: csrc/adamw.h.
//
// A warp takes a block of 256 elements, which it finds in the table of slices; a lane has two groups of 4.
#include <type_traits>

#include "../adamw_update.h"
#include "../launch.h"

namespace qlora::cuda {

// --- the table ----------------------------------------------------------------------------------------------------

namespace {

struct Entry {
  AdamwSlice slice;
  AdamwFactors factors;
  std::int64_t first_block;  // counted through all slices
  std::uint64_t key;         // adamw_key
  bool in_groups;            // all pointers are on the boundary that a group of 4 needs
};

bool is_in_groups(const AdamwSlice& slice) {
  const auto aligned = [](const void* pointer, std::int64_t bytes) {
    return reinterpret_cast<std::uintptr_t>(pointer) % static_cast<std::uintptr_t>(4 * bytes) == 0;
  };
  const int state_bytes = slice.exp_avg_absmax == nullptr ? 4 : 1;
  return aligned(slice.param, itemsize(slice.param_dtype)) && aligned(slice.grad, itemsize(slice.grad_dtype)) &&
         aligned(slice.exp_avg, state_bytes) && aligned(slice.exp_avg_sq, state_bytes);
}

}  // namespace

std::int64_t adamw_table_bytes(std::int64_t n) { return n * static_cast<std::int64_t>(sizeof(Entry)); }

void fill_adamw_table(const AdamwSlice* slices, std::int64_t n, const AdamwOptions& options, void* table) {
  auto* entries = static_cast<Entry*>(table);
  std::int64_t first_block = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    entries[i] = {slices[i], adamw_factors(*slices[i].hyper), first_block, adamw_key(slices[i], options.seed),
                  is_in_groups(slices[i])};
    first_block += adamw_blocks(slices[i]);
  }
}

// --- the kernel ---------------------------------------------------------------------------------------------------

namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kGroup = 4;
constexpr int kGroups = static_cast<int>(kAdamwBlock) / (kWarp * kGroup);

// In global memory, whence a warp copies them in whole lines.
__device__ const DynamicCodebook exp_avg_codebook = kDynamicCodebook, exp_avg_sq_codebook = kUnsignedCodebook;

// nvcc would contract a product and a sum.
struct Math {
  static __device__ float splat(float x) { return x; }
  static __device__ float multiply(float a, float b) { return __fmul_rn(a, b); }
  static __device__ float add(float a, float b) { return __fadd_rn(a, b); }
  static __device__ float subtract(float a, float b) { return __fsub_rn(a, b); }
  static __device__ float divide(float a, float b) { return __fdiv_rn(a, b); }
  static __device__ float sqrt(float a) { return __fsqrt_rn(a); }
};

// The codebook of a state in shared memory.
struct SharedCodebook {
  float value[kNumDynamicCodes], bound[kNumDynamicCodes];

  __device__ void copy(const DynamicCodebook& from, int thread) {
    value[thread] = from.value[thread];
    if (thread < kNumDynamicCodes - 1) bound[thread] = from.bound[thread];
  }
};
static_assert(kThreads == kNumDynamicCodes, "a thread copies one value");

// Four numbers as they lie in memory.
template <typename T>
struct alignas(4 * sizeof(T)) Group {
  T x[kGroup];
};

// `count` numbers of a group; 0 for the others.
template <typename T>
__device__ Group<T> load(const void* array, std::int64_t i, int count, bool in_groups) {
  const T* from = static_cast<const T*>(array) + i;
  if (in_groups && count == kGroup) return *reinterpret_cast<const Group<T>*>(from);
  Group<T> group{};
#pragma unroll
  for (int k = 0; k < kGroup; ++k) {
    if (k < count) group.x[k] = from[k];
  }
  return group;
}

template <typename T>
__device__ void store(void* array, std::int64_t i, int count, bool in_groups, const Group<T>& group) {
  T* to = static_cast<T*>(array) + i;
  if (in_groups && count == kGroup) {
    // __stwb: nvcc makes the plain store into four.
    using Word = std::conditional_t<sizeof(T) == 4, uint4, std::conditional_t<sizeof(T) == 2, uint2, unsigned>>;
    return __stwb(reinterpret_cast<Word*>(to), std::bit_cast<Word>(group));
  }
#pragma unroll
  for (int k = 0; k < kGroup; ++k) {
    if (k < count) to[k] = group.x[k];
  }
}

template <typename T>
__device__ void widen(const Group<T>& group, float (&x)[kGroup]) {
#pragma unroll
  for (int k = 0; k < kGroup; ++k) x[k] = to_float(group.x[k]);
}

__device__ void load_floats(DType dtype, const void* array, std::int64_t i, int count, bool in_groups,
                            float (&x)[kGroup]) {
  switch (dtype) {
    case DType::Float32:
      return widen(load<float>(array, i, count, in_groups), x);
    case DType::Float16:
      return widen(load<Half>(array, i, count, in_groups), x);
    case DType::BFloat16:
      return widen(load<BFloat16>(array, i, count, in_groups), x);
  }
}

template <typename T, typename Round>
__device__ void store_rounded(void* array, std::int64_t i, int count, bool in_groups, const float (&x)[kGroup],
                              Round&& round) {
  Group<T> group;
#pragma unroll
  for (int k = 0; k < kGroup; ++k) group.x[k] = round(x[k], k);
  store(array, i, count, in_groups, group);
}

// Elements i ... of the slice, which are `place` ... of their block.
__device__ void store_param(const Entry& entry, const AdamwOptions& options, std::int64_t i, std::uint32_t place,
                            int count, const float (&x)[kGroup]) {
  void* param = entry.slice.param;
  switch (entry.slice.param_dtype) {
    case DType::Float32:
      return store_rounded<float>(param, i, count, entry.in_groups, x, [](float p, int) { return p; });
    case DType::Float16:
      return store_rounded<Half>(param, i, count, entry.in_groups, x, [](float p, int) { return round_to<Half>(p); });
    case DType::BFloat16:
      const std::uint64_t key =
          options.stochastic_rounding ? random_block_key(entry.key, (entry.slice.first + i) / kAdamwBlock) : 0;
      return store_rounded<BFloat16>(param, i, count, entry.in_groups, x, [&](float p, int k) {
        return options.stochastic_rounding
                   ? round_stochastically(p, random16(key, place + static_cast<std::uint32_t>(k)))
                   : round_to<BFloat16>(p);
      });
  }
}

// A state of a block: in fp32, or in 8 bits with the absmax of the block.
struct State {
  void* array;
  float* absmax;  // null: fp32

  __device__ State(void* array, float* absmax, std::int64_t block)
      : array(array), absmax(absmax == nullptr ? nullptr : absmax + block) {}

  __device__ void load(const SharedCodebook& book, std::int64_t i, int count, bool in_groups,
                       float (&x)[kGroup]) const {
    if (absmax == nullptr) return widen(cuda::load<float>(array, i, count, in_groups), x);
    const Group<std::uint8_t> codes = cuda::load<std::uint8_t>(array, i, count, in_groups);
#pragma unroll
    for (int k = 0; k < kGroup; ++k) x[k] = k < count ? __fmul_rn(book.value[codes.x[k]], *absmax) : 0.0f;
  }

  // All lanes of the warp, with x[j] of their groups.
  __device__ void store(const SharedCodebook& book, const std::int64_t (&i)[kGroups], const int (&count)[kGroups],
                        bool in_groups, const float (&x)[kGroups][kGroup]) const {
    if (absmax == nullptr) {
#pragma unroll
      for (int j = 0; j < kGroups; ++j) {
        store_rounded<float>(array, i[j], count[j], in_groups, x[j], [](float value, int) { return value; });
      }
      return;
    }
    std::uint32_t largest = 0;  // of the magnitudes, as bits: integers order floats of one sign, and NaN last
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
#pragma unroll
      for (int k = 0; k < kGroup; ++k) {
        if (k < count[j]) largest = max(largest, __float_as_uint(x[j][k]) & 0x7fffffffu);
      }
    }
    for (int lanes = 1; lanes < kWarp; lanes *= 2) {
      largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, lanes));
    }
    const float inverse = inverse_group_absmax(__uint_as_float(largest));
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
      store_rounded<std::uint8_t>(array, i[j], count[j], in_groups, x[j], [&](float value, int) {
        return encode_dynamic(book.bound, __fmul_rn(value, inverse));
      });
    }
    if (threadIdx.x % kWarp == 0) *absmax = __uint_as_float(largest);
  }
};

// The slice that has the block: the last that begins no later.
__device__ const Entry& find_entry(const Entry* table, std::int64_t n, std::int64_t block) {
  std::int64_t begin = 0, end = n;
  while (end - begin > 1) {
    const std::int64_t middle = (begin + end) / 2;
    if (table[middle].first_block <= block) {
      begin = middle;
    } else {
      end = middle;
    }
  }
  return table[begin];
}

__global__ void __launch_bounds__(kThreads)
    adamw_kernel(const Entry* table, std::int64_t n, std::int64_t blocks, AdamwOptions options) {
  if (options.found_inf != nullptr && *options.found_inf != 0.0f) return;
  __shared__ SharedCodebook exp_avg_book, exp_avg_sq_book;
  const int thread = static_cast<int>(threadIdx.x);
  exp_avg_book.copy(exp_avg_codebook, thread);
  exp_avg_sq_book.copy(exp_avg_sq_codebook, thread);
  __syncthreads();
  const std::int64_t block_of_all = (std::int64_t{blockIdx.x} * kThreads + thread) / kWarp;
  if (block_of_all >= blocks) return;
  const Entry& entry = find_entry(table, n, block_of_all);
  const AdamwSlice& slice = entry.slice;
  const std::int64_t block = block_of_all - entry.first_block;
  AdamwFactors factors = entry.factors;
  if (options.grad_scale != nullptr) {
    factors.gradient = __fmul_rn(factors.gradient, __fdiv_rn(1.0f, *options.grad_scale));
  }
  const State exp_avg(slice.exp_avg, slice.exp_avg_absmax, block);
  const State exp_avg_sq(slice.exp_avg_sq, slice.exp_avg_sq_absmax, block);
  std::int64_t i[kGroups];
  int count[kGroups];  // may be 0
  float m[kGroups][kGroup], v[kGroups][kGroup];
#pragma unroll
  for (int j = 0; j < kGroups; ++j) {
    const int place = (j * kWarp + thread % kWarp) * kGroup;
    i[j] = block * kAdamwBlock + place;
    count[j] = static_cast<int>(max(min(slice.count - i[j], std::int64_t{kGroup}), std::int64_t{0}));
    float p[kGroup], g[kGroup];
    load_floats(slice.param_dtype, slice.param, i[j], count[j], entry.in_groups, p);
    load_floats(slice.grad_dtype, slice.grad, i[j], count[j], entry.in_groups, g);
    exp_avg.load(exp_avg_book, i[j], count[j], entry.in_groups, m[j]);
    exp_avg_sq.load(exp_avg_sq_book, i[j], count[j], entry.in_groups, v[j]);
#pragma unroll
    for (int k = 0; k < kGroup; ++k) adamw_update<Math>(factors, g[k], p[k], m[j][k], v[j][k]);
    store_param(entry, options, i[j], static_cast<std::uint32_t>(place), count[j], p);
  }
  exp_avg.store(exp_avg_book, i, count, entry.in_groups, m);
  exp_avg_sq.store(exp_avg_sq_book, i, count, entry.in_groups, v);
}

}  // namespace

// --- launcher -----------------------------------------------------------------------------------------------------

cudaError_t launch_adamw(const void* table, std::int64_t n, std::int64_t blocks, const AdamwOptions& options,
                         cudaStream_t stream) {
  if (blocks == 0) return cudaSuccess;
  constexpr std::int64_t kPerCta = kThreads / kWarp;
  const auto ctas = static_cast<unsigned>(ceil_div(blocks, kPerCta));
  adamw_kernel<<<ctas, kThreads, 0, stream>>>(static_cast<const Entry*>(table), n, blocks, options);
  return cudaGetLastError();
}

}  // namespace qlora::cuda
