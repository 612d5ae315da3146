// row_products on every path: as exact as sums in fp32 are, the same bytes however the columns are cut, and nothing
// read or written beyond the rows.
#include "cpu/row_products.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "check.h"
#include "cpu/path.h"
#include "values.h"

using namespace qlora;

namespace {

struct Case {
  std::int64_t M, N, K;
  DType x, b, out;
  std::int64_t beyond;  // numbers between one row and the next
  DType compute = DType::Float32;
};

// What a number is when it is multiplied.
double rounded(double x, DType compute) {
  return compute == DType::BFloat16 ? to_float(round_to<BFloat16>(static_cast<float>(x))) : x;
}

void spoil_between_rows(Values& of, std::int64_t rows, std::int64_t length, std::int64_t stride) {
  for (std::int64_t row = 0; row + 1 < rows; ++row) {
    for (std::int64_t i = row * stride + length; i < (row + 1) * stride; ++i) of.set(i, NAN);
  }
}

void check_case(const Case& c, bool b_as_it_lies, bool masked) {
  const std::int64_t stride = c.K + c.beyond, b_stride = b_as_it_lies ? c.N + c.beyond : stride;
  const std::int64_t rows = b_as_it_lies ? c.K : c.N, row_length = b_as_it_lies ? c.N : c.K;
  Values x(c.x, (c.M - 1) * stride + c.K), b(c.b, (rows - 1) * b_stride + row_length);
  const Values bias(DType::Float32, c.N);
  spoil_between_rows(x, c.M, c.K, stride);
  spoil_between_rows(b, rows, row_length, b_stride);
  const std::int64_t mask_stride = row_length + 3;
  std::vector<std::uint8_t> coins(
      static_cast<std::size_t>(std::max<std::int64_t>((rows - 1) * mask_stride + row_length, 0)), 1);
  for (std::int64_t row = 0; masked && row < rows; ++row) {
    for (std::int64_t i = 0; i < row_length; ++i) {
      if (generator() % 3 != 0) continue;
      coins[static_cast<std::size_t>(row * mask_stride + i)] = 0;
      b.set(row * b_stride + i, NAN);
    }
  }
  const auto* mask = reinterpret_cast<const bool*>(coins.data());
  const auto multiply = [&](const float* addend, std::int64_t addend_stride, Values& out, std::int64_t part) {
    for (std::int64_t n = 0; n < c.N; n += part) {
      cpu::row_products({{x.bytes.data(), c.x, stride},
                         {b.bytes.data(), c.b, b_stride, masked ? mask : nullptr, mask_stride},
                         b_as_it_lies,
                         c.compute,
                         0.75f,
                         addend,
                         addend_stride,
                         out.bytes.data(),
                         c.out,
                         c.M,
                         c.N,
                         c.K},
                        n, std::min(n + part, c.N));
    }
  };
  const bool pairs = c.compute == DType::BFloat16 && cpu::path() >= cpu::Path::Avx512Bf16;
  const auto operand = [&](const Values& of, std::int64_t i) {
    return rounded(of.exact[static_cast<std::size_t>(i)], pairs ? DType::BFloat16 : DType::Float32);
  };
  const auto check = [&](const Values& out, double times) {
    for (std::int64_t m = 0; m < c.M; ++m) {
      for (std::int64_t n = 0; n < c.N; ++n) {
        double exact = 0, magnitude = 0;
        for (std::int64_t k = 0; k < c.K; ++k) {
          const std::int64_t row = b_as_it_lies ? k : n, column = b_as_it_lies ? n : k;
          if (!mask[row * mask_stride + column]) continue;
          const double term = 0.75 * times * operand(x, m * stride + k) * operand(b, row * b_stride + column);
          exact += term;
          magnitude += std::fabs(term);
        }
        exact += bias.exact[static_cast<std::size_t>(n)];
        const double of_out = c.out == DType::Float32 ? 0x1p-24 : c.out == DType::Float16 ? 0x1p-11 : 0x1p-8;
        CHECK(std::fabs(out.read(m * c.N + n) - exact) <=
              magnitude * 0x1p-21 + std::fabs(exact) * of_out * 1.01 + 1e-6);
      }
    }
  };
  const auto* added = reinterpret_cast<const float*>(bias.bytes.data());
  constexpr std::int64_t kBehind = 16;
  Values out(c.out, c.M * c.N + kBehind);
  const Values before = out;
  multiply(added, 0, out, c.N);
  check(out, 1);
  for (std::int64_t i = c.M * c.N; i < c.M * c.N + kBehind; ++i) CHECK(out.read(i) == before.read(i));
  for (std::int64_t part : {std::int64_t{1}, std::int64_t{5}, std::int64_t{16}}) {
    Values cut = before;  // anew, or a column left out would be that of the part before
    multiply(added, 0, cut, part);
    CHECK(cut.bytes == out.bytes);
  }
  if (c.out == DType::Float32) {  // onto itself, as the second of several adapters
    multiply(reinterpret_cast<const float*>(out.bytes.data()), c.N, out, c.N);
    check(out, 2);
  }
}

// b both ways, with and without a mask, in both kinds of products.
void check_cases(Case c) {
  for (const DType compute : {DType::Float32, DType::BFloat16}) {
    c.compute = compute;
    for (const bool masked : {false, true}) {
      check_case(c, false, masked);
      check_case(c, true, masked);
    }
  }
}

}  // namespace

int main() {
  constexpr DType kAll[] = {DType::Float32, DType::Float16, DType::BFloat16};
  for (const auto& path : cpu::path_names()) {
    cpu::set_path(path);
    for (DType x : kAll) {
      for (DType b : kAll) {
        for (DType out : kAll) check_cases({3, 37, 45, x, b, out, 0});
      }
    }
    check_cases({2, 5, 0, DType::BFloat16, DType::Float32, DType::Float32, 0});
    check_cases({0, 5, 3, DType::BFloat16, DType::Float32, DType::Float32, 0});
    check_cases({9, 530, 300, DType::BFloat16, DType::BFloat16, DType::Float32, 2});  // beyond a rectangle both ways
    // Less than a vector (of 8 or 16), whole ones, and one more, both of rows of b and of numbers in them.
    for (std::int64_t N : {1, 8, 15, 16, 17, 40}) {
      for (std::int64_t K : {1, 7, 8, 16, 17, 31, 33, 100}) {
        check_cases({1, N, K, DType::BFloat16, DType::Float32, DType::Float32, 0});
        check_cases({2, N, K, DType::Float32, DType::BFloat16, DType::BFloat16, 3});
      }
    }
    for (std::int64_t M : {3, 4, 5, 7, 8, 9}) {  // tiles of rows, and what is left
      check_cases({M, 20, 40, DType::BFloat16, DType::BFloat16, DType::Float32, 0});
    }
    check_cases({cpu::kMostRowProducts, 33, 20, DType::BFloat16, DType::Float32, DType::BFloat16, 1});
    check_cases({1, 16, 4096, DType::BFloat16, DType::Float32, DType::BFloat16, 0});
  }
  return failures();
}
