// The vector kernels' codes against the portable ones where they are made by other means: NF4 of bf16 by integers
// alone, and the 8-bit codes of absmax by lines.
#include <bit>
#include <cmath>
#include <limits>
#include <random>
#include <type_traits>
#include <vector>

#include "check.h"
#include "cpu/bf16_codes.h"
#include "cpu/path.h"
#include "cpu/quantize.h"
#include "double_quant.h"

using namespace qlora;

namespace {

std::vector<std::uint32_t> bits_of(const std::vector<float>& values) {
  std::vector<std::uint32_t> bits;
  for (const float value : values) bits.push_back(std::bit_cast<std::uint32_t>(value));
  return bits;
}

struct Quantized {
  std::vector<std::uint8_t> packed;
  std::vector<std::uint32_t> absmax;  // the bits: NaN is not equal to itself
  bool operator==(const Quantized&) const = default;
};

template <typename T>
Quantized quantize(const std::vector<T>& weight, std::int64_t blocksize) {
  constexpr DType kDType = std::is_same_v<T, Half> ? DType::Float16 : DType::BFloat16;
  const auto n = static_cast<std::int64_t>(weight.size());
  const std::int64_t blocks = (n + blocksize - 1) / blocksize;
  std::vector<std::uint8_t> packed(weight.size() / 2 + 64, 0xa5);  // what lies behind must stay as it is
  std::vector<float> absmax(static_cast<std::size_t>(blocks) + 16, 3.0f);
  cpu::quantize_4bit(weight.data(), kDType, n, blocksize, QuantType::NF4, 0, blocks, packed.data(), absmax.data());
  return {packed, bits_of(absmax)};
}

template <typename T>
void check(const std::vector<T>& weight, std::int64_t blocksize) {
  cpu::set_path("portable");
  const Quantized expected = quantize(weight, blocksize);
  for (const auto& path : cpu::path_names()) {
    cpu::set_path(path);
    CHECK(quantize(weight, blocksize) == expected);
  }
}

// Every magnitude down to the last step, and beyond it a few: of both signs, in blocks of this absmax.
void check_all_below(std::uint16_t absmax, std::int64_t blocksize) {
  std::vector<std::uint16_t> magnitudes{0, 1, 0x7f, 0x80};
  for (int below = 0; below < cpu::kBf16Steps + 300 && below < absmax; ++below) {
    magnitudes.push_back(static_cast<std::uint16_t>(absmax - below));
  }
  std::vector<BFloat16> weight;
  for (const std::uint16_t magnitude : magnitudes) {
    if (magnitude > absmax) continue;
    for (const int sign : {0, 0x8000}) {
      if (static_cast<std::int64_t>(weight.size()) % blocksize == 0) weight.push_back({absmax});
      weight.push_back({static_cast<std::uint16_t>(magnitude | sign)});
    }
  }
  while (static_cast<std::int64_t>(weight.size()) % (16 * blocksize) != 0) weight.push_back({absmax});
  check(weight, blocksize);
}

// A group of another kind than its neighbours must not change their codes.
void check_groups(std::int64_t blocksize) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  const float kinds[] = {1.0f,
                         0.0f,
                         0x1p-130f,
                         0x1p-120f,
                         0x1p+120f,
                         0x1p+127f,
                         std::numeric_limits<float>::infinity(),
                         std::numeric_limits<float>::quiet_NaN()};
  std::vector<BFloat16> weight;
  for (int group = 0; group < 40; ++group) {
    const float kind = group % 3 == 0 ? kinds[group / 3 % 8] : 1.0f;
    for (std::int64_t i = 0; i < 16 * blocksize; ++i) {
      weight.push_back(round_to<BFloat16>(normal(random) * (i % 700 == 5 ? kind : 1.0f)));
    }
  }
  weight.resize(weight.size() - static_cast<std::size_t>(blocksize) * 3 - 2);
  check(weight, blocksize);
}

// Any NaN is its block's absmax as it is: a signalling one does not become quiet.
template <typename T>
void check_nan(std::uint16_t first) {
  constexpr std::int64_t kBlock = 32, kBlocks = 16;
  std::vector<T> weight(kBlock * kBlocks, round_to<T>(1.0f));
  for (std::uint16_t block = 0; block < kBlocks; ++block) {
    weight[static_cast<std::size_t>(block * (kBlock + 1))] = {static_cast<std::uint16_t>(first + block)};
  }
  check(weight, kBlock);
}

void check_absmax(const std::vector<float>& absmax) {
  cpu::set_path("portable");
  const DoubleQuantized expected(absmax);
  for (const auto& path : cpu::path_names()) {
    cpu::set_path(path);
    const DoubleQuantized got(absmax);
    CHECK(got.codes == expected.codes);
    CHECK(bits_of(got.nested_absmax) == bits_of(expected.nested_absmax));
  }
}

// Around every bound of the codebook, in groups whose scale is 1 and whose mean is about 0.
std::vector<float> around_bounds() {
  std::vector<float> near;
  for (const float bound : kDynamicCodebook.bound) {
    float below = bound, above = bound;
    near.push_back(bound);
    for (int i = 0; i < 4; ++i) {
      near.push_back(below = std::nextafter(below, -2.0f));
      near.push_back(above = std::nextafter(above, 2.0f));
    }
  }
  std::vector<float> absmax;
  for (std::size_t i = 0; i < near.size(); ++i) {
    if (absmax.size() % kNestedBlocksize == 0) absmax.insert(absmax.end(), {1.0f, -1.0f});
    absmax.insert(absmax.end(), {near[i], -near[i]});
  }
  return absmax;
}

}  // namespace

int main() {
  for (const std::uint32_t exponent : {1u, 7u, 8u, 9u, 10u, 127u, 200u, 249u, 250u, 254u}) {
    for (std::uint32_t mantissa = 0; mantissa < 128; ++mantissa) {
      check_all_below(static_cast<std::uint16_t>(exponent << 7 | mantissa), mantissa % 2 == 0 ? 64 : 32);
    }
  }
  for (const std::int64_t blocksize : {32, 64, 128, 512}) check_groups(blocksize);
  check_nan<Half>(0x7c01);
  check_nan<BFloat16>(0x7f81);

  check_absmax(around_bounds());
  std::mt19937 random(1);
  std::lognormal_distribution<float> lognormal(-4.0f, 1.0f);
  std::vector<float> absmax(20000);
  for (float& each : absmax) each = lognormal(random);
  check_absmax(absmax);
  for (const float special : {std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN(), 3e38f}) {
    absmax[777] = special;
    check_absmax(absmax);
  }
  check_absmax(std::vector<float>(700, 0.25f));
  check_absmax(std::vector<float>(300, 0x1p-140f));
  return failures();
}
