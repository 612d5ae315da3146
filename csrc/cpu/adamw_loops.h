// The loops of AdamW around the instructions of one path. A file of kernels includes this inside its target region, so
// that everything here is compiled for it.
//
// Isa is the Math of adamw_update.h and has
//   kLanes          numbers in a V
//   load, store     of any dtype
//   Random, round   the random bits of a block, and bf16 rounded by those of elements i ...
//   Largest         the largest magnitude of what it is given, by its bits: integers order floats of one sign, NaN last
//   Codes<signed>   of the 8-bit states: decode codes to kDecoded V, encode kEncoded finite values
#include "../adamw_update.h"
#include "dynamic_codes_loops.h"

namespace qlora::cpu {
namespace {

// A block's parameters and gradients.
template <typename Isa, typename P, typename G, bool kStochastic>
struct Block {
  P* param;
  const G* grad;
  std::int64_t count;
  const AdamwFactors* factors;
  typename Isa::Random random;  // of stochastic rounding

  // Elements i ...
  void update(std::int64_t i, typename Isa::V& m, typename Isa::V& v) const {
    typename Isa::V p = Isa::load(param + i);
    adamw_update<Isa>(*factors, Isa::load(grad + i), p, m, v);
    if constexpr (kStochastic) {
      Isa::round(param + i, p, random, i);
    } else {
      Isa::store(param + i, p);
    }
  }
};

template <typename Isa, typename B>
void update_32bit(const B& block, float* exp_avg, float* exp_avg_sq) {
  for (std::int64_t i = 0; i < block.count; i += Isa::kLanes) {
    auto m = Isa::load(exp_avg + i), v = Isa::load(exp_avg_sq + i);
    block.update(i, m, v);
    Isa::store(exp_avg + i, m);
    Isa::store(exp_avg_sq + i, v);
  }
}

template <typename Isa, typename B>
void update_8bit(const B& block, const typename Isa::template Codes<true>& codes_m,
                 const typename Isa::template Codes<false>& codes_v, std::uint8_t* exp_avg, std::uint8_t* exp_avg_sq,
                 float* exp_avg_absmax, float* exp_avg_sq_absmax) {
  constexpr int kDecoded = Isa::template Codes<true>::kDecoded;
  static_assert(Isa::template Codes<false>::kDecoded == kDecoded);
  alignas(64) float ms[kAdamwBlock], vs[kAdamwBlock];
  typename Isa::Largest largest_m, largest_v;
  const auto old_m = Isa::splat(*exp_avg_absmax), old_v = Isa::splat(*exp_avg_sq_absmax);
  for (std::int64_t i = 0; i < block.count; i += kDecoded * Isa::kLanes) {
    typename Isa::V m[kDecoded], v[kDecoded];
    codes_m.decode(exp_avg + i, m);
    codes_v.decode(exp_avg_sq + i, v);
#pragma GCC unroll 4
    for (int j = 0; j < kDecoded; ++j) {
      const std::int64_t at = i + j * Isa::kLanes;
      m[j] = Isa::multiply(m[j], old_m);
      v[j] = Isa::multiply(v[j], old_v);
      block.update(at, m[j], v[j]);
      largest_m.add(m[j]);
      largest_v.add(v[j]);
      Isa::store(ms + at, m[j]);
      Isa::store(vs + at, v[j]);
    }
  }
  const Scale scale_m(largest_m.bits()), scale_v(largest_v.bits());
  encode_block(codes_m, ms, block.count, scale_m, exp_avg);
  encode_block(codes_v, vs, block.count, scale_v, exp_avg_sq);
  *exp_avg_absmax = scale_m.absmax;
  *exp_avg_sq_absmax = scale_v.absmax;
}

// Blocks [begin, end) of the slice.
template <typename Isa, typename P, typename G, bool kStochastic>
void update_blocks(const AdamwTask& task, std::int64_t begin, std::int64_t end) {
  const AdamwSlice& slice = *task.slice;
  const bool is_8bit = slice.exp_avg_absmax != nullptr;
  const typename Isa::template Codes<true> codes_m;
  const typename Isa::template Codes<false> codes_v;
  for (std::int64_t block = begin; block < end; ++block) {
    const std::int64_t at = block * kAdamwBlock;
    const std::int64_t left = slice.count - at;
    const Block<Isa, P, G, kStochastic> elements{
        static_cast<P*>(slice.param) + at, static_cast<const G*>(slice.grad) + at, smaller(left, kAdamwBlock),
        &task.factors, typename Isa::Random(random_block_key(task.key, (slice.first + at) / kAdamwBlock))};
    if (is_8bit) {
      update_8bit<Isa>(elements, codes_m, codes_v, static_cast<std::uint8_t*>(slice.exp_avg) + at,
                       static_cast<std::uint8_t*>(slice.exp_avg_sq) + at, slice.exp_avg_absmax + block,
                       slice.exp_avg_sq_absmax + block);
    } else {
      update_32bit<Isa>(elements, static_cast<float*>(slice.exp_avg) + at, static_cast<float*>(slice.exp_avg_sq) + at);
    }
  }
}

template <typename Isa>
void update_slice(const AdamwTask& task, std::int64_t begin, std::int64_t end) {
  with_type(task.slice->param_dtype, [&](auto param) {
    with_type(task.slice->grad_dtype, [&](auto grad) {
      using P = decltype(param);
      using G = decltype(grad);
      if constexpr (std::is_same_v<P, BFloat16>) {
        if (task.stochastic_rounding) return update_blocks<Isa, P, G, true>(task, begin, end);
      }
      update_blocks<Isa, P, G, false>(task, begin, end);
    });
  });
}

}  // namespace
}  // namespace qlora::cpu
