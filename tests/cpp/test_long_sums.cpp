// Long sums of products in fp32, on every path and by every kernel: as exact as those of chains no longer than their
// number, which one chain is far from.
#include <cmath>
#include <vector>

#include "check.h"
#include "cpu/linear_4bit_dgrad.h"
#include "cpu/matmul.h"
#include "cpu/path.h"
#include "cpu/row_products.h"
#include "weight.h"

using namespace qlora;

namespace {

constexpr std::int64_t kLength = 28672, kChain = 169, kWidth = 32;  // of a sum; columns
constexpr DType kDtype = DType::Float32;

const float* floats(const Values& values) { return reinterpret_cast<const float*>(values.bytes.data()); }

// out = row[M, kLength] @ column[kLength, kWidth], both functions of their indices: its errors' mean square is at most
// that of sums of chains of kChain.
template <typename Row, typename Column>
void check_sums(const Values& out, std::int64_t M, Row&& row, Column&& column) {
  double error = 0, of_chains = 0;
  for (std::int64_t m = 0; m < M; ++m) {
    for (std::int64_t j = 0; j < kWidth; ++j) {
      double exact = 0;
      float sum = 0, chain = 0;
      for (std::int64_t i = 0; i < kLength; ++i) {
        const double a = row(m, i), b = column(i, j);
        exact += a * b;
        chain = std::fma(static_cast<float>(a), static_cast<float>(b), chain);
        if ((i + 1) % kChain != 0 && i + 1 < kLength) continue;
        sum += chain;
        chain = 0;
      }
      error += std::pow(out.read(m * kWidth + j) - exact, 2);
      of_chains += std::pow(sum - exact, 2);
    }
  }
  CHECK(error <= of_chains);
}

void check_linear_4bit(std::int64_t M) {
  if (M > cpu::most_few_rows(kDtype)) return;
  const Weight w(kWidth, kLength, 64, QuantType::NF4, true);
  const Values x(kDtype, M * kLength);
  Values y(kDtype, M * kWidth);
  const auto arranged = room_for_x(kDtype, M, kWidth, kLength);
  cpu::arrange_x(x.bytes.data(), kDtype, M, kWidth, kLength, arranged.get());
  cpu::linear_4bit({arranged.get(), w.view, nullptr, 0, y.bytes.data(), M, kWidth, kLength, kDtype}, 0, kWidth);
  check_sums(
      y, M, [&](std::int64_t m, std::int64_t i) { return x.exact[static_cast<std::size_t>(m * kLength + i)]; },
      [&](std::int64_t i, std::int64_t j) { return w.decoded[static_cast<std::size_t>(j * kLength + i)]; });
}

void check_linear_4bit_dgrad(std::int64_t M) {
  if (M > cpu::most_few_rows_of_grad(kDtype, kWidth)) return;
  const Weight w(kLength, kWidth, 32, QuantType::NF4, true);
  const Values grad(kDtype, M * kLength);
  Values grad_x(kDtype, M * kWidth);
  cpu::linear_4bit_dgrad({floats(grad), kLength, w.view, nullptr, grad_x.bytes.data(), M, kLength, kWidth, kDtype}, 0,
                         kWidth);
  check_sums(
      grad_x, M, [&](std::int64_t m, std::int64_t i) { return grad.exact[static_cast<std::size_t>(m * kLength + i)]; },
      [&](std::int64_t i, std::int64_t j) { return w.decoded[static_cast<std::size_t>(i * kWidth + j)]; });
}

void check_row_products(std::int64_t M, bool as_it_lies) {
  const Values x(kDtype, M * kLength), b(kDtype, kLength * kWidth);
  const std::int64_t stride = as_it_lies ? kWidth : kLength;
  Values out(kDtype, M * kWidth);
  cpu::row_products({.x = {x.bytes.data(), kDtype, kLength},
                     .b = {b.bytes.data(), kDtype, stride},
                     .b_as_it_lies = as_it_lies,
                     .compute = kDtype,
                     .scale = 1.0f,
                     .addend = nullptr,
                     .addend_stride = 0,
                     .out = out.bytes.data(),
                     .dtype = kDtype,
                     .M = M,
                     .N = kWidth,
                     .K = kLength},
                    0, kWidth);
  check_sums(
      out, M, [&](std::int64_t m, std::int64_t i) { return x.exact[static_cast<std::size_t>(m * kLength + i)]; },
      [&](std::int64_t i, std::int64_t j) {
        return b.exact[static_cast<std::size_t>(as_it_lies ? i * kWidth + j : j * kLength + i)];
      });
}

// Of the dense product there are two, each of which counts, by its mask, in every other element.
void check_matmul(std::int64_t M, cpu::Term::Kind kind) {
  if (!cpu::has_matmul(kDtype)) return;
  const bool transposed = kind == cpu::Term::Kind::WeightTransposed;
  const Weight w = transposed ? Weight(kWidth, kLength, 64, QuantType::NF4, true)
                              : Weight(kLength, kWidth, 32, QuantType::NF4, true);
  const Values x(kDtype, M * kLength), dense(kDtype, kLength * kWidth);
  Values out(kDtype, M * kWidth);
  std::vector<std::uint8_t> even(static_cast<std::size_t>(M * kWidth)), odd(even.size());
  for (std::size_t i = 0; i < even.size(); ++i) odd[i] = i % 2, even[i] = 1 - odd[i];
  const auto mask = [](const std::vector<std::uint8_t>& from) { return reinterpret_cast<const bool*>(from.data()); };
  cpu::Term term{};
  term.R = kLength;
  term.x = {x.bytes.data(), kDtype, kLength, 1};
  term.kind = kind;
  term.w = w.view;
  term.dense = {dense.bytes.data(), kDtype, kWidth, 1};
  std::vector<cpu::Term> terms{term};
  if (kind == cpu::Term::Kind::Dense) {
    terms.push_back(term);
    terms[0].out_mask = mask(odd);
    terms[1].out_mask = mask(even);
  }
  const cpu::Matmul product{M,       kWidth,           terms.data(), static_cast<int>(terms.size()),
                            nullptr, out.bytes.data(), kDtype,       kDtype};
  std::vector<float> arranged(static_cast<std::size_t>(cpu::arranged_floats(product, M)));
  const cpu::MatmulRows rows{0, M, arranged.data()};
  cpu::arrange_rows(product, rows, 0, M);
  cpu::matmul(product, rows, {0, M, 0, kWidth});
  check_sums(
      out, M, [&](std::int64_t m, std::int64_t i) { return x.exact[static_cast<std::size_t>(m * kLength + i)]; },
      [&](std::int64_t i, std::int64_t j) -> double {
        if (kind == cpu::Term::Kind::Dense) return dense.exact[static_cast<std::size_t>(i * kWidth + j)];
        return w.decoded[static_cast<std::size_t>(transposed ? j * kLength + i : i * kWidth + j)];
      });
}

}  // namespace

int main() {
  for (const auto& path : cpu::path_names()) {
    cpu::set_path(path);
    generator.seed(7);  // the same numbers, whichever paths came before
    for (std::int64_t M : {1, 2, 3, 4, 5, 6, 8, 16}) {
      check_linear_4bit(M);
      check_linear_4bit_dgrad(M);
      for (const bool as_it_lies : {false, true}) check_row_products(M, as_it_lies);
    }
    for (const auto kind : {cpu::Term::Kind::Weight, cpu::Term::Kind::WeightTransposed, cpu::Term::Kind::Dense}) {
      check_matmul(13, kind);
    }
  }
  return failures();
}
