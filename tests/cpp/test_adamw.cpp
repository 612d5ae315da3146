// AdamW: every path gives the portable bytes, however the work is cut; those are the same on every machine; 8-bit
// states have the nearest codes; stochastic rounding is fair.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <vector>

#include "adamw.h"
#include "check.h"
#include "cpu/adamw.h"
#include "cpu/path.h"

using namespace qlora;

namespace {

using Bytes = std::vector<std::uint8_t>;

struct Random {
  std::uint32_t state = 1;
  std::uint32_t next() { return state = state * 1664525u + 1013904223u; }
  float number() {  // in [-1, 1), more of them near 0
    const float x = static_cast<float>(static_cast<std::int32_t>(next()) >> 8) * 0x1p-23f;
    return x * x * x;
  }
};

template <typename T>
void append(Bytes& bytes, const T& value) {
  const auto at = bytes.size();
  bytes.resize(at + sizeof value);
  std::memcpy(bytes.data() + at, &value, sizeof value);
}

// One parameter with everything that its update needs.
struct Parameter {
  DType param_dtype, grad_dtype;
  bool is_8bit;
  std::int64_t count;
  AdamwHyper hyper{1e-3, 0.9, 0.999, 1e-8, 0.01, 1, false};
  Bytes param, grad, exp_avg, exp_avg_sq;
  std::vector<float> exp_avg_absmax, exp_avg_sq_absmax;

  Parameter(DType param_dtype, DType grad_dtype, bool is_8bit, std::int64_t count)
      : param_dtype(param_dtype), grad_dtype(grad_dtype), is_8bit(is_8bit), count(count) {}

  // From element `first` on, which is on a block's boundary.
  AdamwSlice slice(std::int64_t first, std::int64_t elements) {
    const std::int64_t state_bytes = is_8bit ? 1 : 4, block = first / kAdamwBlock;
    return {.param = param.data() + first * itemsize(param_dtype),
            .grad = grad.data() + first * itemsize(grad_dtype),
            .param_dtype = param_dtype,
            .grad_dtype = grad_dtype,
            .count = elements,
            .first = first,
            .index = 3,
            .exp_avg = exp_avg.data() + first * state_bytes,
            .exp_avg_sq = exp_avg_sq.data() + first * state_bytes,
            .exp_avg_absmax = is_8bit ? exp_avg_absmax.data() + block : nullptr,
            .exp_avg_sq_absmax = is_8bit ? exp_avg_sq_absmax.data() + block : nullptr,
            .hyper = &hyper};
  }
};

void append_number(Bytes& bytes, DType dtype, float value) {
  with_type(dtype, [&](auto type) { append(bytes, round_to<decltype(type)>(value)); });
}

// In the midst of a training. Every seventh gradient is 0. extreme: some blocks are all zeros, subnormal or large, have
// a NaN or Inf, or 8-bit states that no training leaves: a negative second moment, first ones that are not finite.
Parameter make_parameter(DType param_dtype, DType grad_dtype, bool is_8bit, std::int64_t count, bool extreme = false) {
  Parameter p(param_dtype, grad_dtype, is_8bit, count);
  Random random;
  for (std::int64_t i = 0; i < count; ++i) {
    float grad = i % 7 == 0 ? 0.0f : random.number() * 0.01f, m = random.number() * 0.01f;
    float v = random.number() * random.number() * 1e-4f, param = random.number();
    v = v < 0 ? -v : v;
    const std::int64_t kind = extreme ? i / kAdamwBlock % 8 : 0;
    if (kind == 1) grad = m = v = 0.0f;
    if (kind == 2) grad *= 0x1p-120f, m *= 0x1p-130f, v *= 0x1p-130f, param *= 0x1p-130f;
    if (kind == 3) grad *= 0x1p+80f, m *= 0x1p+120f, v *= 0x1p+120f;
    if (kind == 4 && i % 100 == 0) grad = std::numeric_limits<float>::infinity();
    if (kind == 5 && i % 100 == 0) grad = std::numeric_limits<float>::quiet_NaN();
    append_number(p.param, param_dtype, param);
    append_number(p.grad, grad_dtype, grad);
    if (is_8bit) {
      p.exp_avg.push_back(static_cast<std::uint8_t>(random.next() >> 24));
      const auto code = static_cast<std::uint8_t>(random.next() >> 24);
      p.exp_avg_sq.push_back(kind != 6 ? code : i % kAdamwBlock == 5 ? 200 : 0);
      if (i % kAdamwBlock == 0) {
        const float scale = kind == 1 ? 0.0f : kind == 2 ? 0x1p-130f : kind == 3 ? 0x1p+120f : 1.0f;
        p.exp_avg_absmax.push_back(kind == 7 ? std::numeric_limits<float>::infinity() : scale * 0.01f);
        p.exp_avg_sq_absmax.push_back(kind == 6 ? -1e-4f : scale * 1e-4f);
      }
    } else {
      append(p.exp_avg, m);
      append(p.exp_avg_sq, v);
    }
  }
  return p;
}

template <typename T>
void append_canonical(Bytes& to, const Bytes& from) {
  for (std::size_t i = 0; i < from.size(); i += sizeof(T)) {
    T value;
    std::memcpy(&value, from.data() + i, sizeof value);
    append(to, to_float(value) != to_float(value) ? round_to<T>(std::numeric_limits<float>::quiet_NaN()) : value);
  }
}

// All that an update writes; which NaN it writes is the machine's own, but for parameters in bf16, where it is one.
Bytes results(const Parameter& p) {
  Bytes bytes;
  if (p.param_dtype == DType::BFloat16) {
    bytes = p.param;
  } else {
    with_type(p.param_dtype, [&](auto type) { append_canonical<decltype(type)>(bytes, p.param); });
  }
  for (const Bytes* state : {&p.exp_avg, &p.exp_avg_sq}) {
    if (p.is_8bit) {
      bytes.insert(bytes.end(), state->begin(), state->end());
    } else {
      append_canonical<float>(bytes, *state);
    }
  }
  Bytes absmax;
  for (const auto* values : {&p.exp_avg_absmax, &p.exp_avg_sq_absmax}) {
    for (float value : *values) append(absmax, value);
  }
  append_canonical<float>(bytes, absmax);
  return bytes;
}

Bytes updated(Parameter p, const AdamwOptions& options = {}) {
  const AdamwSlice slice = p.slice(0, p.count);
  cpu::adamw(&slice, 1, options, 0, adamw_blocks(slice));
  return results(p);
}

template <typename Body>
void for_all_kinds(Body&& body) {
  for (DType param : {DType::Float32, DType::Float16, DType::BFloat16}) {
    for (DType grad : {DType::Float32, DType::Float16, DType::BFloat16}) {
      for (bool is_8bit : {false, true}) body(param, grad, is_8bit);
    }
  }
}

// --- paths --------------------------------------------------------------------------------------------------------

void check_paths() {
  const float scale = 3.0f;
  for_all_kinds([&](DType param, DType grad, bool is_8bit) {
    for (std::int64_t count : {1, 255, 256, 257, 8 * 256 + 100}) {
      for (bool extreme : {false, true}) {
        Parameter p = make_parameter(param, grad, is_8bit, count, extreme);
        p.hyper.maximize = count == 257;
        if (count == 255) p.hyper.beta1 = 0.25;
        for (const AdamwOptions& options :
             {AdamwOptions{}, AdamwOptions{.grad_scale = &scale, .stochastic_rounding = true, .seed = 5}}) {
          cpu::set_path("portable");
          const Bytes expected = updated(p, options);
          for (const std::string& path : cpu::path_names()) {
            cpu::set_path(path);
            CHECK(updated(p, options) == expected);
          }
        }
      }
    }
  });
}

// --- how the work is cut ------------------------------------------------------------------------------------------

void check_cuts() {
  for_all_kinds([](DType param, DType grad, bool is_8bit) {
    const std::int64_t count = 5 * 256 + 77;
    const Parameter whole = make_parameter(param, grad, is_8bit, count);
    const AdamwOptions options{.stochastic_rounding = true, .seed = 9};
    const Bytes expected = updated(whole, options);

    Parameter ranges = whole;
    const AdamwSlice slice = ranges.slice(0, count);
    for (const auto& [begin, end] : {std::pair{3, 6}, {0, 1}, {1, 3}}) cpu::adamw(&slice, 1, options, begin, end);
    CHECK(results(ranges) == expected);

    Parameter parts = whole;  // among empty slices; the ranges do not end where the slices do
    const AdamwSlice slices[] = {parts.slice(0, 0), parts.slice(0, 512), parts.slice(512, 0), parts.slice(512, 256),
                                 parts.slice(768, count - 768)};
    CHECK_EQ(adamw_blocks(slices, 5), 6);
    for (const auto& [begin, end] : {std::pair{4, 6}, {0, 0}, {0, 3}, {3, 4}}) {
      cpu::adamw(slices, 5, options, begin, end);
    }
    CHECK(results(parts) == expected);
  });
}

void check_found_inf() {
  const Parameter p = make_parameter(DType::Float32, DType::Float32, false, 300);
  const float found = 1.0f, none = 0.0f;
  CHECK(updated(p, {.found_inf = &found}) == results(p));
  CHECK(updated(p, {.found_inf = &none}) == updated(p));
}

// --- the same on every machine ------------------------------------------------------------------------------------

// With step 1, as powers are the C library's own.
void check_digest() {
  const float scale = 3.0f;
  std::uint64_t digest = 0xcbf29ce484222325u;  // FNV-1a
  for_all_kinds([&](DType param, DType grad, bool is_8bit) {
    const AdamwOptions options{.grad_scale = param == DType::Float16 ? &scale : nullptr,
                               .stochastic_rounding = param == DType::BFloat16,
                               .seed = 1};
    Parameter p = make_parameter(param, grad, is_8bit, 9 * 256 + 5, true);
    p.hyper.maximize = grad == DType::Float16;
    for (std::uint8_t byte : updated(p, options)) {
      digest = (digest ^ byte) * 0x100000001b3u;
    }
  });
  constexpr std::uint64_t kExpected = 0x1e8723f65f948d51u;
  if (digest != kExpected)
    std::printf("%s: %#llx\n", cpu::path_name(cpu::path()), static_cast<unsigned long long>(digest));
  CHECK_EQ(digest, kExpected);
}

// --- 8-bit states -------------------------------------------------------------------------------------------------

// With beta1 = 0, and no states before, they become g and (1 - beta2) g^2: gradients on both sides of every bound, in
// blocks that a 1 scales. Each beta2 rounds squares otherwise: these 26 reach every bound and the number above it.
void check_nearest_codes(double beta2) {
  std::vector<float> grads;
  const auto add = [&](float value) {
    if (grads.size() % kAdamwBlock == 0) grads.push_back(1.0f);
    grads.push_back(value);
  };
  const auto add_around = [&](float value) {
    const auto bits = std::max(std::bit_cast<std::uint32_t>(value), 40u);
    for (std::uint32_t near = bits - 40; near != bits + 41; ++near) add(std::bit_cast<float>(near));
  };
  for (float bound : kDynamicCodebook.bound) add_around(bound);
  for (float bound : kUnsignedCodebook.bound) add_around(std::sqrt(bound));
  for (float x : {0.0f, -0.0f, -1.0f, 1e-30f, -1e-30f, 0x1p-149f}) add(x);
  for (std::uint32_t bits = 0; bits < 0x3f800000u; bits += 9973) {
    add(std::bit_cast<float>(bits));
    add(-std::bit_cast<float>(bits));
  }
  const auto count = static_cast<std::int64_t>(grads.size());
  Parameter p(DType::Float32, DType::Float32, true, count);
  p.hyper.beta1 = 0.0;
  p.hyper.beta2 = beta2;
  const auto square = static_cast<float>(1 - beta2), inverse = inverse_group_absmax(square);
  p.param.resize(grads.size() * 4);
  p.grad.resize(grads.size() * 4);
  std::memcpy(p.grad.data(), grads.data(), p.grad.size());
  p.exp_avg.resize(grads.size(), 127);
  p.exp_avg_sq.resize(grads.size(), 0);
  p.exp_avg_absmax.resize(grads.size() / kAdamwBlock + 1);
  p.exp_avg_sq_absmax = p.exp_avg_absmax;
  const AdamwSlice slice = p.slice(0, count);
  cpu::adamw(&slice, 1, {}, 0, adamw_blocks(slice));
  for (std::size_t i = 0; i < grads.size(); ++i) {
    CHECK_EQ(p.exp_avg[i], encode_dynamic(kDynamicCodebook.bound, grads[i]));
    CHECK_EQ(p.exp_avg_sq[i], encode_dynamic(kUnsignedCodebook.bound, grads[i] * square * grads[i] * inverse));
  }
  for (float absmax : p.exp_avg_absmax) CHECK_EQ(absmax, 1.0f);
  for (float absmax : p.exp_avg_sq_absmax) CHECK_EQ(absmax, square);
}

// With beta1 = beta2 = 1 the states stay: every code is decoded to the value that it encodes.
void check_codes_stay() {
  Parameter p(DType::Float32, DType::Float32, true, kAdamwBlock);
  p.hyper.beta1 = p.hyper.beta2 = 1.0;
  p.param.resize(kAdamwBlock * 4);
  p.grad.resize(kAdamwBlock * 4);
  for (int code = 0; code < 256; ++code) {
    p.exp_avg.push_back(static_cast<std::uint8_t>(code));
    p.exp_avg_sq.push_back(static_cast<std::uint8_t>(255 - code));
  }
  p.exp_avg_absmax.push_back(0.37f);
  p.exp_avg_sq_absmax.push_back(0.21f);
  const Parameter before = p;
  const AdamwSlice slice = p.slice(0, p.count);
  cpu::adamw(&slice, 1, {}, 0, 1);
  CHECK(p.exp_avg == before.exp_avg && p.exp_avg_sq == before.exp_avg_sq);
  CHECK(p.exp_avg_absmax == before.exp_avg_absmax && p.exp_avg_sq_absmax == before.exp_avg_sq_absmax);
}

// --- stochastic rounding ------------------------------------------------------------------------------------------

// Each of the 16 bits is 1 half of the time, and independent of those of other elements, blocks, parameters and steps.
void check_random_bits() {
  AdamwHyper hyper{};
  AdamwSlice slice{};
  slice.hyper = &hyper;
  const std::uint64_t first = adamw_key(slice, 0);
  const std::uint64_t seed = adamw_key(slice, 1);
  slice.index = 1;
  const std::uint64_t index = adamw_key(slice, 0);
  slice.index = 0, hyper.step = 1;
  const std::uint64_t step = adamw_key(slice, 0);

  constexpr int kBlocks = 1000, kCount = kBlocks * 256;
  const double most = 5 * std::sqrt(kCount / 4.0);  // five standard deviations
  const auto bits = [](std::uint64_t key, std::int64_t block, std::uint32_t i) {
    return random16(random_block_key(key, block), i);
  };
  int ones[16] = {}, equal[7][16] = {};
  for (std::int64_t block = 0; block < kBlocks; ++block) {
    for (std::uint32_t i = 0; i < 256; ++i) {
      const std::uint32_t random = bits(first, block, i);
      CHECK(random < 0x10000u);
      const std::uint32_t others[7] = {bits(seed, block, i),
                                       bits(index, block, i),
                                       bits(step, block, i),
                                       bits(first, block + 1, i),
                                       bits(first, block, (i + 1) % 256),
                                       bits(first, block, i ^ 128u),
                                       random >> 1 | random << 15};
      for (int bit = 0; bit < 16; ++bit) {
        ones[bit] += static_cast<int>(random >> bit & 1u);
        for (int other = 0; other < 7; ++other)
          equal[other][bit] += static_cast<int>(~(random ^ others[other]) >> bit & 1u);
      }
    }
  }
  for (int bit = 0; bit < 16; ++bit) {
    CHECK(std::fabs(ones[bit] - kCount / 2.0) < most);
    for (const auto& other : equal) CHECK(std::fabs(other[bit] - kCount / 2.0) < most);
  }
}

void check_stochastic_rounding() {
  for (std::uint32_t random : {0u, 1u, 0x8000u, 0xffffu}) {
    for (std::uint32_t bits = 0; bits < 0x10000u; ++bits) {  // what bf16 has stays
      const float x = to_float(BFloat16{static_cast<std::uint16_t>(bits)});
      const BFloat16 rounded = round_stochastically(x, random);
      CHECK(x != x ? rounded.bits == 0x7fc0 : rounded.bits == bits);
    }
  }
  for (std::uint32_t part : {1u, 0x1234u, 0x8000u, 0xffffu}) {  // up as often as the part that is cut off says
    for (std::uint32_t upper : {0x3f80u, 0xbf80u, 0x0000u, 0x4049u}) {
      std::uint32_t up = 0;
      for (std::uint32_t random = 0; random < 0x10000u; ++random) {
        up += round_stochastically(std::bit_cast<float>(upper << 16 | part), random).bits - upper;
      }
      CHECK_EQ(up, part);
    }
  }
}

}  // namespace

int main() {
  check_paths();
  check_random_bits();
  check_stochastic_rounding();
  for (const std::string& path : cpu::path_names()) {
    cpu::set_path(path);
    check_cuts();
    check_found_inf();
    check_digest();
    for (int i = 0; i < 26; ++i) check_nearest_codes(i / 26.0);
    check_codes_stay();
  }
  return failures();
}
