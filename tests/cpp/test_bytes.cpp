// The bytes of the format do not depend on machine or compiler: digests of what the kernels make of a fixed weight,
// taken from the portable path on x86-64, hold on every path of every machine.
#include <bit>
#include <cstdio>
#include <cstring>
#include <limits>
#include <vector>

#include "check.h"
#include "cpu/dequantize_4bit.h"
#include "cpu/path.h"
#include "cpu/quantize.h"
#include "double_quant.h"

using namespace qlora;

namespace {

// FNV-1a, 64 bits.
struct Digest {
  std::uint64_t value = 0xcbf29ce484222325u;

  template <typename T>
  void add(const std::vector<T>& values) {
    for (const T& one : values) {
      std::uint8_t bytes[sizeof one];
      std::memcpy(bytes, &one, sizeof one);
      for (std::uint8_t byte : bytes) value = (value ^ byte) * 0x100000001b3u;
    }
  }
};

struct Digests {
  Digest packed, absmax, codes, nested_absmax, values, double_quantized_values;
};

// What stands in a run of 1500 weights: it covers blocks of every size and boundaries of most.
constexpr int kRun = 1500;
enum class Content { Ordinary, Zero, Subnormal, Large, Tie, Special };

// By integers and powers of two alone: what <random> and <cmath> give depends on the library.
template <typename T>
std::vector<T> make_weight(std::int64_t n, std::initializer_list<Content> runs) {
  std::uint32_t state = 1;
  std::vector<T> weight;
  for (std::int64_t i = 0; i < n; ++i) {
    state = state * 1664525u + 1013904223u;
    const float x = static_cast<float>(static_cast<std::int32_t>(state) >> 8) * 0x1p-23f;
    float value = x * x * x;  // in [-1, 1), more of them near 0
    switch (runs.begin()[static_cast<std::size_t>(i / kRun) % runs.size()]) {
      case Content::Ordinary:
        break;
      case Content::Zero:
        value = 0.0f;
        break;
      case Content::Subnormal:
        value *= std::is_same_v<T, Half> ? 0x1p-15f : 0x1p-127f;
        break;
      case Content::Large:
        value *= std::is_same_v<T, Half> ? 0x1.ffcp+15f : 0x1.fep+127f;
        break;
      case Content::Tie:  // fp32, and with it absmax, halfway between two numbers of bf16 or fp16
        value = std::bit_cast<float>(i / 64 % 2 == 0 ? (std::bit_cast<std::uint32_t>(value) | 0xffffu) ^ 0x7fffu
                                                     : (std::bit_cast<std::uint32_t>(value) | 0x1fffu) ^ 0x0fffu);
        break;
      case Content::Special:
        if (i % 700 == 0) value = std::numeric_limits<float>::infinity();
        if (i % 1100 == 0) value = std::numeric_limits<float>::quiet_NaN();
        break;
    }
    weight.push_back(round_to<T>(value));
  }
  return weight;
}

void add_dequantized(const Packed4bit& w, std::int64_t n, Digest& to) {
  for (DType dtype : {DType::Float32, DType::Float16, DType::BFloat16}) {
    with_type(dtype, [&](auto type) {
      using T = decltype(type);
      std::vector<T> values(static_cast<std::size_t>(n));
      cpu::dequantize_4bit(w, 0, n, dtype, values.data());
      for (T& value : values) {  // the sign of 0 * Inf is the machine's own
        if (to_float(value) != to_float(value)) value = round_to<T>(std::numeric_limits<float>::quiet_NaN());
      }
      to.add(values);
    });
  }
}

template <typename T>
void digest(const std::vector<T>& weight, DType dtype, QuantType quant_type, std::int64_t blocksize, bool double_quant,
            Digests& to) {
  const auto n = static_cast<std::int64_t>(weight.size());
  const std::int64_t blocks = (n + blocksize - 1) / blocksize;
  std::vector<std::uint8_t> packed(static_cast<std::size_t>((n + 1) / 2));
  std::vector<float> absmax(static_cast<std::size_t>(blocks));
  cpu::quantize_4bit(weight.data(), dtype, n, blocksize, quant_type, 0, blocks, packed.data(), absmax.data());
  to.packed.add(packed);
  to.absmax.add(absmax);
  add_dequantized({packed.data(), absmax.data(), nullptr, nullptr, quant_type, blocksize}, n, to.values);
  if (!double_quant) return;

  const DoubleQuantized scales(absmax);
  to.codes.add(scales.codes);
  to.nested_absmax.add(scales.nested_absmax);
  to.nested_absmax.add(std::vector<float>{scales.offset});
  const Packed4bit w{packed.data(),  scales.codes.data(), scales.nested_absmax.data(),
                     &scales.offset, quant_type,          blocksize};
  add_dequantized(w, n, to.double_quantized_values);
}

template <typename T>
Digests digests(DType dtype) {
  constexpr std::int64_t n = 20001;
  const auto ordinary = make_weight<T>(n, {Content::Ordinary, Content::Zero, Content::Ordinary, Content::Subnormal});
  const auto large = make_weight<T>(n, {Content::Ordinary, Content::Large, Content::Tie});
  const auto special = make_weight<T>(n, {Content::Special, Content::Ordinary});
  Digests out;
  for (QuantType quant_type : {QuantType::NF4, QuantType::FP4}) {
    for (std::int64_t blocksize : {32, 64, 256, 4096}) {
      digest(ordinary, dtype, quant_type, blocksize, true, out);
      digest(large, dtype, quant_type, blocksize, true, out);
      digest(special, dtype, quant_type, blocksize, false, out);  // its mean is NaN: all scales would be
    }
  }
  return out;
}

void check(DType dtype, const Digests& expected) {
  for (const auto& path : cpu::path_names()) {
    cpu::set_path(path);
    const Digests got = with_type(dtype, [&](auto type) { return digests<decltype(type)>(dtype); });
    const int before = failure_count();
    CHECK_EQ(got.packed.value, expected.packed.value);
    CHECK_EQ(got.absmax.value, expected.absmax.value);
    CHECK_EQ(got.codes.value, expected.codes.value);
    CHECK_EQ(got.nested_absmax.value, expected.nested_absmax.value);
    CHECK_EQ(got.values.value, expected.values.value);
    CHECK_EQ(got.double_quantized_values.value, expected.double_quantized_values.value);
    if (failure_count() == before) continue;
    std::printf("dtype %d, path %s:", static_cast<int>(dtype), path.c_str());
    for (const Digest& one :
         {got.packed, got.absmax, got.codes, got.nested_absmax, got.values, got.double_quantized_values}) {
      std::printf(" {0x%016llx},", static_cast<unsigned long long>(one.value));
    }
    std::printf("\n");
  }
}

}  // namespace

int main() {
  check(DType::Float32, {{0x89e46cedcfff69cb},
                         {0x9c42ad25bb7abc81},
                         {0x683b92f68f6ee819},
                         {0x8b615e1258c54919},
                         {0x94acf4cf65f85e36},
                         {0xcbbfdb73b4f5c0ec}});
  check(DType::Float16, {{0xe32c3f374718b335},
                         {0xac164709362a5d7d},
                         {0xbe6a7b06ce3bcd15},
                         {0x57f6b795c85d3b01},
                         {0x6d42358fe5a18db0},
                         {0x02d58f16b35072b1}});
  check(DType::BFloat16, {{0xd636e61d504461e4},
                          {0x61357374cd1f8591},
                          {0xc11945cf4d76e83d},
                          {0xf816c83fb81e6259},
                          {0x7488ac82128808a8},
                          {0xad60afbfd1475b81}});
  return failures();
}
