// linear_4bit_dgrad with few rows: grad_x[M, K] = grad[M, N] @ W[N, K], W decoded between memory and the tensor cores.
//
// The sum runs over the rows of W, so an mma operand wants pairs of rows where the bytes hold pairs of columns. Two
// words of neighbouring rows exchange nibbles, four instructions for 16 weights, and then the pair table of linear_4bit
// decodes them.
//
// The absmax of a weight depends on its row, so it cannot scale the sum: it scales grad, in fp32, before the rounding
// to bf16. A warp whose lanes reach over two blocks of W's columns gives each block its own columns of the mma, with
// grad scaled by its absmax; of the results a lane keeps those of its own block. fp16 has no room for that product
// (gradients are small): there the decoded pair is multiplied by the absmax rounded to fp16, one rounding more than
// decoding the weight has.
//
// Per 64 weights and lane (kLaneBytes 8, M <= 4): 4 loads, 16 to exchange nibbles, 64 to decode, 8 mma, 8 to scale
// grad.
#include <type_traits>

#include "../launch.h"
#include "absmax.cuh"
#include "pair_table.cuh"
#include "pairs.cuh"
#include "ptx.cuh"
#include "split.cuh"

namespace qlora::cuda {
namespace {

constexpr int kGroup = 16;  // rows of W in one mma
constexpr int kUnitN = 64;  // the most that is dealt out to the CTAs at once
constexpr int kStepN = 32;  // the least: less would be over before the first weights are there

// kLaneBytes: of a row of W that a lane reads, 4 or 8. kLaneBlocks: absmax blocks that the lanes of a warp reach over,
// 1 or 2. kColumnTiles: of 8 columns of the mma, which are rows of grad, or 4 rows of grad for each of two blocks.
template <typename T_, int kLaneBytes_, int kLaneBlocks_, int kColumnTiles_, int kWarps_>
struct Config {
  using T = T_;
  using Word = std::conditional_t<kLaneBytes_ == 8, uint2, std::uint32_t>;
  static constexpr int kLaneBytes = kLaneBytes_, kLaneBlocks = kLaneBlocks_, kColumnTiles = kColumnTiles_;
  static constexpr int kWarps = kWarps_, kThreads = 32 * kWarps;
  static constexpr int kWarpK = 16 * kLaneBytes, kTileK = kWarps * kWarpK;
  static constexpr int kTileM = 8 * kColumnTiles / kLaneBlocks;
  static constexpr int kTileBlocks = kWarps * kLaneBlocks;  // at the smallest blocksize
  // Rows of W whose absmax and grad are in shared memory at a time.
  static constexpr int kChunkN = kTileM <= 32 ? 256 : 128;
  static constexpr int kAhead = kLaneBlocks == 2 ? 2 : 4;  // groups whose weights are loaded ahead
  static constexpr int kUnroll = kColumnTiles == 1 ? kUnitN / kGroup : kColumnTiles == 2 ? 2 : 1;
  static constexpr int kCtasPerSm = kWarps == 8 && kLaneBytes * kColumnTiles <= 8 ? 2 : 1;
  // grad lies in the slots of the table: as fp32, which is scaled at once, where there is room. A unit is a group's 16
  // values.
  using Staged = std::conditional_t<std::is_same_v<T, BFloat16> && kLaneBytes == 8, float, T>;
  static constexpr int kUnitBytes = kGroup * sizeof(Staged), kSlotUnits = kSlotBytes / kUnitBytes;
  static constexpr int kRowSlots = kChunkN / kGroup / kSlotUnits;  // of a row of grad
  static_assert(kTileM * kRowSlots <= kSlots);
  // Shared memory: the pair table with grad in its slots, the dynamic codebook, scales[kTileBlocks][kChunkN].
  static constexpr int kCodebookAt = kTableBytes;
  static constexpr int kScalesAt = kCodebookAt + 4 * kNumDynamicCodes;
  static constexpr int kSharedBytes = kScalesAt + 4 * kTileBlocks * kChunkN;
};

__device__ __forceinline__ std::uint32_t word(std::uint32_t words, int) { return words; }
__device__ __forceinline__ std::uint32_t word(uint2 words, int i) { return i == 0 ? words.x : words.y; }

// The bytes of the high and of the low nibbles of a and b, a's in the high nibble.
__device__ __forceinline__ std::uint32_t high_nibbles(std::uint32_t a, std::uint32_t b) {
  return merge_bits<0xf0f0f0f0u>(a, b >> 4);
}
__device__ __forceinline__ std::uint32_t low_nibbles(std::uint32_t a, std::uint32_t b) {
  return merge_bits<0xf0f0f0f0u>(a << 4, b);
}

template <typename C>
__global__ void __launch_bounds__(C::kThreads, C::kCtasPerSm)
    linear_4bit_dgrad_kernel(const __grid_constant__ ProductArguments args) {
#if QLORA_FUSED
  using T = typename C::T;
  constexpr bool kScaleWeights = std::is_same_v<T, Half>;
  extern __shared__ __align__(16) char shared[];
  auto* codebook = reinterpret_cast<float*>(shared + C::kCodebookAt);
  auto* scales = reinterpret_cast<float*>(shared + C::kScalesAt);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int group = lane / 4, member = lane % 4;
  const std::uint32_t lane4 = 4 * lane;
  const Split& split = args.split;
  const std::int64_t row_bytes = args.K / 2;
  const AbsmaxReader absmax(args.w, args.K >> args.blocksize_log2, codebook);
  const int first_m = blockIdx.y * C::kTileM, rows_m = min(C::kTileM, args.M - first_m);

  fill_pair_table<T>(shared, args.w.quant_type);
  for (int i = threadIdx.x; i < kNumDynamicCodes; i += C::kThreads) codebook[i] = device_dynamic_codebook.value[i];

  for (int begin = split.begin(blockIdx.x); begin < split.begin(opaque(blockIdx.x) + 1);) {
    const int tile = begin / split.units;
    const int first_unit = begin % split.units;
    const int end_unit = min(split.units, first_unit + split.begin(opaque(blockIdx.x) + 1) - begin);
    const int unit_n = split.unit_steps * kStepN;
    const int first_n = first_unit * unit_n, end_n = min(end_unit * unit_n, args.N);
    const int lane_k = tile * C::kTileK + warp * C::kWarpK + group * 2 * C::kLaneBytes;
    const int lane_block = (warp * C::kWarpK + group * 2 * C::kLaneBytes) >> args.blocksize_log2;

    // --- weights: in registers, kAhead groups ahead ---
    const std::uint8_t* next_weights[4];  // what the lane loads next
#pragma unroll
    for (int i = 0; i < 4; ++i) next_weights[i] = args.w.packed + lane_k / 2 + (first_n + 4 * member + i) * row_bytes;
    const bool lane_inside = lane_k < args.K;
    struct Group {
      typename C::Word rows[4];
    };
    // Where the rows, or K, end the weights are any: grad is 0 there, or the sum is not kept.
    auto load_weights = [&](int n, auto all_inside) {  // rows [n, n + 16), which follow those of the call before
      Group loaded;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        load_once(loaded.rows[i], next_weights[i], lane_inside && (all_inside() || n + 4 * member + i < end_n));
        next_weights[i] += kGroup * row_bytes;
      }
      return loaded;
    };

    // --- grad and scales of a chunk ---
    auto stage_grad = [&](int n) {
      using Staged = typename C::Staged;
      const int piece = args.N % 8 == 0 ? 8 : 2;  // elements that are read at once
      const int row_pieces = C::kChunkN / piece;
#pragma unroll 1
      for (int i = threadIdx.x; i < rows_m * row_pieces; i += C::kThreads) {
        const int m = i / row_pieces, column = i % row_pieces * piece, unit = column / kGroup;
        const int slot = m * C::kRowSlots + unit / C::kSlotUnits;
        // Units are swizzled by m, so that the rows of an mma do not conflict.
        auto* to = reinterpret_cast<Staged*>(slot_address(shared, slot) +
                                             (unit % C::kSlotUnits ^ m % C::kSlotUnits) * C::kUnitBytes) +
                   column % kGroup;
        const T* from = static_cast<const T*>(args.x) + static_cast<std::int64_t>(first_m + m) * args.N + n + column;
        uint4 read = {0, 0, 0, 0};
        if (n + column < end_n) {
          if (piece == 8) {
            read = __ldg(reinterpret_cast<const uint4*>(from));
          } else {
            read.x = __ldg(reinterpret_cast<const std::uint32_t*>(from));
          }
        }
        if constexpr (std::is_same_v<Staged, float>) {
          auto* pairs = reinterpret_cast<float2*>(to);
          pairs[0] = unpack_pair(read.x, T{});
          if (piece == 8) {
            pairs[1] = unpack_pair(read.y, T{}), pairs[2] = unpack_pair(read.z, T{}),
            pairs[3] = unpack_pair(read.w, T{});
          }
        } else if (piece == 8) {
          *reinterpret_cast<uint4*>(to) = read;
        } else {
          *reinterpret_cast<std::uint32_t*>(to) = read.x;
        }
      }
    };
    auto stage_scales = [&](int n) {
      const int first_block = tile * C::kTileK >> args.blocksize_log2;
      const int tile_blocks = C::kTileK >> args.blocksize_log2;
      const int run_blocks = min(absmax.run_length, tile_blocks);
      const int row_runs = tile_blocks / run_blocks;
#pragma unroll 1
      for (int i = threadIdx.x; i < C::kChunkN * row_runs; i += C::kThreads) {
        const int row = i / row_runs, run = i % row_runs * run_blocks;
        const bool inside = n + row < end_n;
        const int end = min(first_block + run + run_blocks, absmax.blocks_per_row);
        const AbsmaxRun read = absmax.read(n + row, first_block + run, 0, inside ? end : 0);
        absmax.decode(read, inside ? n + row : 0, first_block + run, run_blocks, [&](int block, float value) {
          scales[(run + block) * C::kChunkN + row] = inside ? value : 0.0f;
        });
      }
    };

    Group ahead[C::kAhead];
#pragma unroll
    for (int i = 0; i < C::kAhead; ++i) ahead[i] = load_weights(first_n + i * kGroup, std::false_type{});

    float sum[C::kLaneBytes][C::kColumnTiles][4] = {};
    // all_inside: the rows that it loads are known to exist.
    auto compute = [&](int chunk_n, unsigned unit, auto all_inside) {
      constexpr int kUnroll = decltype(all_inside)::value ? C::kUnroll : 1;
#pragma unroll kUnroll
      for (unsigned i = 0; i < kUnitN / kGroup; ++i) {
        const unsigned n = unit * kUnitN + i * kGroup;
        const Group now = ahead[0];
#pragma unroll
        for (int a = 0; a + 1 < C::kAhead; ++a) ahead[a] = ahead[a + 1];
        ahead[C::kAhead - 1] = load_weights(chunk_n + n + C::kAhead * kGroup, all_inside);

        const float4 scale = *reinterpret_cast<const float4*>(scales + lane_block * C::kChunkN + n + 4 * member);
        const std::uint32_t scale_pairs[2] = {pack_pair(scale.x, scale.y, T{}), pack_pair(scale.z, scale.w, T{})};
        std::uint32_t b[C::kColumnTiles][2];
#pragma unroll
        for (int j = 0; j < C::kColumnTiles; ++j) {
          const unsigned m = C::kLaneBlocks == 1 ? 8 * j + group : 4 * j + group % 4;
          const char* from = slot_address(shared, m * C::kRowSlots + n / kGroup / C::kSlotUnits) +
                             (n / kGroup % C::kSlotUnits ^ m % C::kSlotUnits) * C::kUnitBytes +
                             member * (C::kUnitBytes / 4);
          if constexpr (std::is_same_v<typename C::Staged, float>) {
            const float4 grad = *reinterpret_cast<const float4*>(from);
            b[j][0] = pack_pair(grad.x * scale.x, grad.y * scale.y, T{});
            b[j][1] = pack_pair(grad.z * scale.z, grad.w * scale.w, T{});
          } else {
            const uint2 pairs = *reinterpret_cast<const uint2*>(from);
            b[j][0] = pairs.x, b[j][1] = pairs.y;
            if constexpr (!kScaleWeights) {
              const float2 first = unpack_pair(pairs.x, T{}), second = unpack_pair(pairs.y, T{});
              b[j][0] = pack_pair(first.x * scale.x, first.y * scale.y, T{});
              b[j][1] = pack_pair(second.x * scale.z, second.y * scale.w, T{});
            }
          }
        }

#pragma unroll
        for (int part = 0; part < C::kLaneBytes / 4; ++part) {
          const std::uint32_t row0 = word(now.rows[0], part), row1 = word(now.rows[1], part);
          const std::uint32_t row2 = word(now.rows[2], part), row3 = word(now.rows[3], part);
          const std::uint32_t even01 = high_nibbles(row0, row1), odd01 = low_nibbles(row0, row1);
          const std::uint32_t even23 = high_nibbles(row2, row3), odd23 = low_nibbles(row2, row3);
          auto multiply = [&](auto which) {  // columns 2 byte and 2 byte + 1 of the lane
            constexpr int kByte = decltype(which)::value;
            std::uint32_t a[4] = {lookup_pair<kByte>(shared, even01, lane4), lookup_pair<kByte>(shared, odd01, lane4),
                                  lookup_pair<kByte>(shared, even23, lane4), lookup_pair<kByte>(shared, odd23, lane4)};
            if constexpr (kScaleWeights) {
#pragma unroll
              for (int e = 0; e < 4; ++e) a[e] = multiply_pairs(a[e], scale_pairs[e / 2], T{});
            }
#pragma unroll
            for (int j = 0; j < C::kColumnTiles; ++j) mma_add<T>(sum[4 * part + kByte][j], a, b[j][0], b[j][1]);
          };
          multiply(std::integral_constant<int, 0>{});
          multiply(std::integral_constant<int, 1>{});
          multiply(std::integral_constant<int, 2>{});
          multiply(std::integral_constant<int, 3>{});
        }
      }
    };
    for (int chunk_n = first_n; chunk_n < end_n; chunk_n += C::kChunkN) {
      __syncthreads();  // the table is there, and all warps are done with the chunk before
      stage_grad(chunk_n);
      stage_scales(chunk_n);
      __syncthreads();
      const int units = (min(C::kChunkN, end_n - chunk_n) + kUnitN - 1) / kUnitN;
      const int inner_units = min(units, (end_n - chunk_n - C::kAhead * kGroup) / kUnitN);
      int unit = 0;
      for (; unit < inner_units; ++unit) compute(chunk_n, unit, std::true_type{});
      for (; unit < units; ++unit) compute(chunk_n, unit, std::false_type{});
    }

    // --- the tile's sum: written if this CTA has all of it, else put together by the last CTA ---
    auto* grad_x = static_cast<T*>(args.out) + static_cast<std::int64_t>(first_m) * args.K;
    auto write = [&](int m, int k, float even, float odd) {
      *reinterpret_cast<std::uint32_t*>(grad_x + static_cast<std::int64_t>(m) * args.K + k) = pack_pair(even, odd, T{});
    };
    auto for_each_sum = [&](auto&& body) {  // body(m, k in the tile, sums of k and k + 1)
      const int first_k = opaque(warp * C::kWarpK + group * 2 * C::kLaneBytes);
      const bool own_block = C::kLaneBlocks == 1 || group / 4 == member / 2;
#pragma unroll
      for (int i = 0; i < C::kLaneBytes; ++i) {
#pragma unroll
        for (int j = 0; j < C::kColumnTiles; ++j) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int m = C::kLaneBlocks == 1 ? 8 * j + 2 * member + e : 4 * j + 2 * (member % 2) + e;
            if (own_block && m < rows_m && tile * C::kTileK + first_k < args.K) {
              body(m, first_k + 2 * i, sum[i][j][e], sum[i][j][2 + e]);
            }
          }
        }
      }
    };
    const int contributors = split.last_cta(tile) - split.first_cta(tile) + 1;
    if (contributors == 1) {
      for_each_sum([&](int m, int k, float even, float odd) { write(m, tile * C::kTileK + k, even, odd); });
    } else {
      const std::int64_t tile_values = static_cast<std::int64_t>(min(args.M, C::kTileM)) * C::kTileK;
      float* partials = args.partials + static_cast<std::int64_t>(blockIdx.y) * split.partial_slots() * tile_values;
      float* partial = partials + split.partial_slot(blockIdx.x, tile) * tile_values;
      for_each_sum([&](int m, int k, float even, float odd) {
        *reinterpret_cast<float2*>(partial + m * C::kTileK + k) = make_float2(even, odd);
      });
      if (last_to_arrive(args.arrivals + blockIdx.y * split.tiles + tile, contributors)) {
        for (int i = 4 * threadIdx.x; i < rows_m * C::kTileK; i += 4 * C::kThreads) {
          const int m = i / C::kTileK, k = tile * C::kTileK + i % C::kTileK;
          if (k >= args.K) continue;
          const float4 four = sum_of_partials(partials, split, tile, tile_values, i);
          write(m, k, four.x, four.y), write(m, k + 2, four.z, four.w);
        }
      }
    }
    begin += end_unit - first_unit;
  }
#else
  __trap();
#endif
}

template <typename C>
int tiles_m(const Product4bit& p) {
  return static_cast<int>(ceil_div(p.M, C::kTileM));
}

// Of a layer: all have the partial sums of the first, the last may use fewer.
template <typename C>
std::int64_t tile_values(const Product4bit& p) {
  return std::min<std::int64_t>(p.M, C::kTileM) * C::kTileK;
}

template <typename C>
Split split_of(const Product4bit& p, const DeviceLimits& limits) {
  const Work work = {.tiles = ceil_div(p.K, C::kTileK),
                     .steps = ceil_div(p.N, kStepN),
                     .layers = tiles_m<C>(p),
                     .most_unit_steps = kUnitN / kStepN,
                     .least_unit_steps = 1,
                     .tile_values = tile_values<C>(p),
                     .weight_bytes = p.N * p.K / 2};
  return make_split(work, resident_ctas(limits, C::kSharedBytes, C::kCtasPerSm));
}

// Calls body with the Config of the product.
template <typename Body>
auto with_config(const Product4bit& p, Body&& body) {
  auto with_type = [&](auto type) {
    using T = decltype(type);
    if (p.w.blocksize == 32) return p.M <= 4 ? body(Config<T, 4, 2, 1, 16>{}) : body(Config<T, 4, 2, 4, 16>{});
    if (p.M <= 4) return body(Config<T, 8, 2, 1, 8>{});
    if (p.M <= 8) return body(Config<T, 8, 2, 2, 8>{});
    if (p.M <= 16) return body(Config<T, 4, 1, 2, 16>{});
    if (p.M <= 32) return body(Config<T, 4, 1, 4, 8>{});
    return body(Config<T, 4, 1, 8, 8>{});
  };
  return p.dtype == DType::BFloat16 ? with_type(BFloat16{}) : with_type(Half{});
}

}  // namespace

std::int64_t linear_4bit_dgrad_workspace_bytes(const Product4bit& p, const DeviceLimits& limits) {
  return with_config(p, [&](auto config) {
    using C = decltype(config);
    return Meeting(split_of<C>(p, limits), tiles_m<C>(p), tile_values<C>(p)).bytes();
  });
}

cudaError_t launch_linear_4bit_dgrad(const Product4bit& p, const DeviceLimits& limits, void* workspace,
                                     cudaStream_t stream) {
  if (!takes_fused(p)) return cudaErrorInvalidValue;
  return with_config(p, [&](auto config) {
    using C = decltype(config);
    const Split split = split_of<C>(p, limits);
    const Meeting meeting(split, tiles_m<C>(p), tile_values<C>(p));
    return launch_product(linear_4bit_dgrad_kernel<C>, p, split, tiles_m<C>(p), meeting, C::kThreads, C::kSharedBytes,
                          workspace, stream);
  });
}

}  // namespace qlora::cuda
