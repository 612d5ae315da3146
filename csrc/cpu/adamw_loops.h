// The loops of AdamW around the instructions of one path. A file of kernels includes this inside its target region, so
// that everything here is compiled for it.
//
// Isa is the Math of adamw_update.h and has
//   kLanes          numbers in a V
//   load, store     of any dtype
//   Random, round   the random bits of a block, and bf16 rounded by those of elements i ...
//   Largest<signed> the largest magnitude of what it is given, by its bits: integers order floats of one sign, NaN
//                   last; not signed, of what has no sign bit: else, bits beyond those of Inf
//   Codes<signed>   of the 8-bit states: decode codes to kDecoded V; encode kEncoded values (dynamic_codes_loops.h)
#include "../adamw_update.h"
#include "dynamic_codes_loops.h"

namespace qlora::cpu {
namespace {

// The Math of these vectors.
template <typename Vectors>
struct Arithmetic : Vectors {
  using V = typename Vectors::Vector;

  static V multiply(V a, V b) { return a * b; }
  static V add(V a, V b) { return a + b; }
  static V subtract(V a, V b) { return a - b; }
  static V divide(V a, V b) { return a / b; }
};

// A block's parameters and gradients.
template <typename Isa, typename P, typename G, bool kStochastic>
struct Block {
  P* param;
  const G* grad;
  const AdamwFactors* factors;
  bool scaled;                  // gradients have a factor other than 1
  typename Isa::Random random;  // of stochastic rounding

  // Of elements i ...

  void moments(std::int64_t i, typename Isa::V& m, typename Isa::V& v) const {
    typename Isa::V g = Isa::load(grad + i);
    if (scaled) g = Isa::multiply(g, Isa::splat(factors->gradient));
    adamw_moments<Isa>(*factors, g, m, v);
  }

  void step(std::int64_t i, typename Isa::V m, typename Isa::V v) const {
    typename Isa::V p = Isa::load(param + i);
    adamw_parameter<Isa>(*factors, m, v, p);
    if constexpr (kStochastic) {
      Isa::round(param + i, p, random, i);
    } else {
      Isa::store(param + i, p);
    }
  }
};

template <typename Isa, typename B>
void update_32bit(const B& block, float* exp_avg, float* exp_avg_sq) {
  for (std::int64_t i = 0; i < kAdamwBlock; i += Isa::kLanes) {
    auto m = Isa::load(exp_avg + i), v = Isa::load(exp_avg_sq + i);
    block.moments(i, m, v);
    block.step(i, m, v);
    Isa::store(exp_avg + i, m);
    Isa::store(exp_avg_sq + i, v);
  }
}

// --- 8-bit states: all of a block are known before any is encoded --------------------------------------------------

struct States {
  alignas(64) float m[kAdamwBlock], v[kAdamwBlock];
  std::uint32_t largest_m, largest_v;
};

// Where a block's are stored.
struct Stored {
  std::uint8_t *exp_avg, *exp_avg_sq;
  float *exp_avg_absmax, *exp_avg_sq_absmax;
};

template <typename Isa>
struct Encoders {
  typename Isa::template Codes<true> m;
  typename Isa::template Codes<false> v;
};

template <typename Isa, typename B>
void update_moments(const B& block, const Encoders<Isa>& codes, const Stored& old, States& states) {
  constexpr int kDecoded = Isa::template Codes<true>::kDecoded;
  static_assert(Isa::template Codes<false>::kDecoded == kDecoded);
  typename Isa::template Largest<true> largest_m;
  typename Isa::template Largest<false> largest_v;
  const auto old_m = Isa::splat(*old.exp_avg_absmax), old_v = Isa::splat(*old.exp_avg_sq_absmax);
  for (std::int64_t i = 0; i < kAdamwBlock; i += kDecoded * Isa::kLanes) {
    typename Isa::V m[kDecoded], v[kDecoded];
    codes.m.decode(old.exp_avg + i, m);
    codes.v.decode(old.exp_avg_sq + i, v);
#pragma GCC unroll 4
    for (int j = 0; j < kDecoded; ++j) {
      const std::int64_t at = i + j * Isa::kLanes;
      m[j] = Isa::multiply(m[j], old_m);
      v[j] = Isa::multiply(v[j], old_v);
      block.moments(at, m[j], v[j]);
      largest_m.add(m[j]);
      largest_v.add(v[j]);
      Isa::store(states.m + at, m[j]);
      Isa::store(states.v + at, v[j]);
    }
  }
  states.largest_m = largest_m.bits();
  states.largest_v = largest_v.bits();
}

// What the values of a block are encoded relative to, whatever their signs.
template <typename Isa>
Scale scale_of(const float* values) {
  typename Isa::template Largest<true> largest;
  for (std::int64_t i = 0; i < kAdamwBlock; i += Isa::kLanes) largest.add(Isa::load(values + i));
  return Scale(largest.bits());
}

// The parameters, by a unit that divides, while others encode the states: first and second moments in turn, each group
// of the ones placed before a group of the others is encoded.
template <typename Isa, typename B>
void step_and_encode(const B& block, const Encoders<Isa>& codes, const States& states, const Stored& to) {
  constexpr std::int64_t kEncoded = Isa::template Codes<true>::kEncoded;
  static_assert(Isa::template Codes<false>::kEncoded == kEncoded);
  const auto step = [&](std::int64_t begin, std::int64_t end) __attribute__((always_inline)) {
    for (std::int64_t i = begin; i < end; i += Isa::kLanes) {
      block.step(i, Isa::load(states.m + i), Isa::load(states.v + i));
    }
  };
  Scale scale_m(states.largest_m), scale_v(states.largest_v);
  if (__builtin_expect(scale_m.is_finite() && scale_v.is_finite(), 1)) {
    const float inverse_m = scale_m.inverse, inverse_v = scale_v.inverse;
    auto placed_m = codes.m.place(states.m, inverse_m);
    auto placed_v = codes.v.place(states.v, inverse_v);
    for (std::int64_t i = 0; i < kAdamwBlock; i += kEncoded) {
      const std::int64_t next = i + kEncoded, half = i + kEncoded / 2;
      codes.m.encode(placed_m, states.m + i, inverse_m, to.exp_avg + i);
      step(i, half);
      if (next < kAdamwBlock) placed_m = codes.m.place(states.m + next, inverse_m);
      codes.v.encode(placed_v, states.v + i, inverse_v, to.exp_avg_sq + i);
      step(half, next);
      if (next < kAdamwBlock) placed_v = codes.v.place(states.v + next, inverse_v);
    }
  } else {
    step(0, kAdamwBlock);
    scale_v = scale_of<Isa>(states.v);
    encode_block(codes.m, states.m, kAdamwBlock, scale_m, to.exp_avg);
    encode_block(codes.v, states.v, kAdamwBlock, scale_v, to.exp_avg_sq);
  }
  *to.exp_avg_absmax = scale_m.absmax;
  *to.exp_avg_sq_absmax = scale_v.absmax;
}

// Blocks [begin, end) of the slice.
template <typename Isa, typename P, typename G, bool kStochastic>
void update_blocks(const AdamwTask& task, std::int64_t begin, std::int64_t end) {
  const AdamwSlice& slice = *task.slice;
  const auto elements = [&](std::int64_t block) {
    const std::int64_t at = block * kAdamwBlock;
    return Block<Isa, P, G, kStochastic>{
        static_cast<P*>(slice.param) + at, static_cast<const G*>(slice.grad) + at, &task.factors,
        task.factors.gradient != 1.0f,
        typename Isa::Random(random_block_key(task.key, (slice.first + at) / kAdamwBlock))};
  };
  if (slice.exp_avg_absmax == nullptr) {
    for (std::int64_t block = begin; block < end; ++block) {
      const std::int64_t at = block * kAdamwBlock;
      update_32bit<Isa>(elements(block), static_cast<float*>(slice.exp_avg) + at,
                        static_cast<float*>(slice.exp_avg_sq) + at);
    }
    return;
  }
  const auto stored = [&](std::int64_t block) {
    const std::int64_t at = block * kAdamwBlock;
    return Stored{static_cast<std::uint8_t*>(slice.exp_avg) + at, static_cast<std::uint8_t*>(slice.exp_avg_sq) + at,
                  slice.exp_avg_absmax + block, slice.exp_avg_sq_absmax + block};
  };
  const Encoders<Isa> codes;
  // A block is stepped and encoded after the next one's moments are computed: nothing waits for its largest then.
  States states[2];
  for (std::int64_t block = begin; block <= end; ++block) {
    if (block < end) update_moments<Isa>(elements(block), codes, stored(block), states[block % 2]);
    const std::int64_t last = block - 1;
    if (last >= begin) step_and_encode<Isa>(elements(last), codes, states[last % 2], stored(last));
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
