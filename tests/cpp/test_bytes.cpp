// The bytes of the format do not depend on machine or compiler: digests of what the kernels make of a fixed weight,
// taken from the portable path on x86-64, hold on every path of every machine.
#include <bit>
#include <cstdio>
#include <cstring>
#include <limits>
#include <vector>

#include "check.h"
#include "cpu/kernels.h"
#include "cpu/path.h"

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

// What stands in a run of 1500 weights: it covers blocks of every size and borders of most.
constexpr int kRun = 1500;
enum class Content { Ordinary, Zero, Subnormal, Large, Special };

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
      case Content::Special:
        if (i % 700 == 0) value = std::numeric_limits<float>::infinity();
        if (i % 1100 == 0) value = std::numeric_limits<float>::quiet_NaN();
        break;
    }
    weight.push_back(round_to<T>(value));
  }
  return weight;
}

template <typename T>
std::vector<T> dequantize(const Packed4bit& w, std::int64_t n, DType dtype) {
  std::vector<T> values(static_cast<std::size_t>(n));
  cpu::dequantize_4bit(w, 0, n, dtype, values.data());
  for (T& value : values) {  // the sign of 0 * Inf is the machine's own
    if (to_float(value) != to_float(value)) value = round_to<T>(std::numeric_limits<float>::quiet_NaN());
  }
  return values;
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
  to.values.add(dequantize<T>({packed.data(), absmax.data(), nullptr, nullptr, quant_type, blocksize}, n, dtype));
  if (!double_quant) return;

  const std::int64_t groups = (blocks + kNestedBlocksize - 1) / kNestedBlocksize;
  std::vector<std::uint8_t> codes(absmax.size());
  std::vector<float> nested(static_cast<std::size_t>(groups));
  const float offset = cpu::absmax_offset(absmax.data(), blocks);
  cpu::quantize_absmax(absmax.data(), blocks, offset, 0, groups, codes.data(), nested.data());
  to.codes.add(codes);
  to.nested_absmax.add(nested);
  to.nested_absmax.add(std::vector<float>{offset});
  const Packed4bit w{packed.data(), codes.data(), nested.data(), &offset, quant_type, blocksize};
  to.double_quantized_values.add(dequantize<T>(w, n, dtype));
}

template <typename T>
Digests digests(DType dtype) {
  constexpr std::int64_t n = 20001;
  const auto ordinary = make_weight<T>(n, {Content::Ordinary, Content::Zero, Content::Ordinary, Content::Subnormal});
  const auto large = make_weight<T>(n, {Content::Ordinary, Content::Large});
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
  check(DType::Float32, {{0xf847f14afca4e489},
                         {0x91919cbec9cf6845},
                         {0x4a5a50ecd0f15bfd},
                         {0x37aa5d755f90d505},
                         {0x9efd28572fedb0d0},
                         {0xaf4cc7dd6d49478c}});
  check(DType::Float16, {{0xe6d57d18ff5f66cb},
                         {0xfbc413d645daae4d},
                         {0x1bf81003cb2b7fbd},
                         {0x2a46564597302de5},
                         {0xc01e70496f656b37},
                         {0xcf57a43a8c7cd634}});
  check(DType::BFloat16, {{0xcf467ab36b603960},
                          {0x6eca4537eb728319},
                          {0xec079eb1383db42d},
                          {0x33a79207f7b32639},
                          {0x5347086d98c62073},
                          {0xbd73e1aa6bf7758c}});
  return failures();
}
