// No product reads what others have left in memory, on the stack or in what malloc gives again: where that is NaN it
// would be NaN even times zero.
#include <cmath>
#include <cstring>
#include <vector>

#include "check.h"
#include "cpu/linear_4bit_dgrad.h"
#include "cpu/matmul.h"
#include "cpu/path.h"
#include "cpu/row_products.h"
#include "weight.h"

using namespace qlora;

namespace {

// All bits of every number: NaN in each dtype. The first of two such is not malloc's own, and teaches it to keep the
// next.
[[gnu::noinline]] void spoil_heap() {
  for (int i = 0; i < 2; ++i) {
    const std::vector<std::uint8_t> memory(12 << 20, 0xff);
    asm volatile("" ::"r"(memory.data()) : "memory");
  }
}

[[gnu::noinline]] void spoil_stack() {
  std::uint8_t memory[1 << 20];
  std::memset(memory, 0xff, sizeof memory);
  asm volatile("" ::"r"(memory) : "memory");
}

template <typename Product>
void check(const Values& result, Product&& product) {
  spoil_heap();
  spoil_stack();
  product();
  for (std::size_t i = 0; i < result.exact.size(); ++i) CHECK(std::isfinite(result.read(static_cast<std::int64_t>(i))));
}

void check_few_rows(std::int64_t M, std::int64_t N, std::int64_t K, DType dtype, bool double_quant) {
  const Weight w(N, K, 32, QuantType::NF4, double_quant);
  const Values x(dtype, M * K);
  const std::int64_t stride = N + N % 2;
  Values y(dtype, M * N), grad(cpu::dtype_of_grad(dtype), M * stride), grad_x(dtype, M * K);
  for (std::int64_t m = 0; m < M && N < stride; ++m) grad.set(m * stride + N, 0.0f);
  const auto arranged = room_for_x(dtype, M, N, K);
  if (M <= cpu::most_few_rows(dtype)) {
    check(y, [&] {
      cpu::arrange_x(x.bytes.data(), dtype, M, N, K, arranged.get());
      spoil_stack();
      cpu::linear_4bit({arranged.get(), w.view, nullptr, 0, y.bytes.data(), M, N, K, dtype}, 0, N);
    });
  }
  if (M <= cpu::most_few_rows_of_grad(dtype, K)) {
    check(grad_x, [&] {
      cpu::linear_4bit_dgrad({grad.bytes.data(), stride, w.view, nullptr, grad_x.bytes.data(), M, N, K, dtype}, 0, K);
    });
  }
}

void check_matmul(cpu::Term::Kind kind, bool x_as_it_lies, float scale, std::int64_t M, std::int64_t R, std::int64_t J,
                  DType dtype) {
  if (!cpu::has_matmul(dtype)) return;
  const bool transposed = kind == cpu::Term::Kind::WeightTransposed, of_weight = kind != cpu::Term::Kind::Dense;
  const Weight w(transposed ? J : R, of_weight ? transposed ? R : J : 32, 32, QuantType::NF4, false);
  const Values x(dtype, M * R), dense(dtype, R * J);
  cpu::Term term{};
  term.R = R;
  term.x = {x.bytes.data(), dtype, x_as_it_lies ? R : 1, x_as_it_lies ? 1 : M};
  term.kind = kind;
  term.w = w.view;
  term.dense = {dense.bytes.data(), dtype, x_as_it_lies ? J : 1, x_as_it_lies ? 1 : R};
  term.scale = scale;
  Values out(dtype, M * J);
  const cpu::Matmul product{M, J, &term, 1, nullptr, out.bytes.data(), dtype, dtype};
  check(out, [&] {
    std::vector<float> arranged(static_cast<std::size_t>(cpu::arranged_floats(product, M)), NAN);
    const cpu::MatmulRows rows{0, M, arranged.data()};
    cpu::arrange_rows(product, rows, 0, M);
    spoil_stack();
    cpu::matmul(product, rows, {0, M, 0, J});
  });
}

void check_row_products(std::int64_t N, std::int64_t K, bool as_it_lies, bool masked, DType dtype) {
  constexpr std::int64_t M = 3;
  const Values x(dtype, M * K), b(dtype, N * K);
  const std::vector<std::uint8_t> coins(static_cast<std::size_t>(N * K), 1);
  const auto* mask = masked ? reinterpret_cast<const bool*>(coins.data()) : nullptr;
  const std::int64_t stride = as_it_lies ? N : K;
  Values out(dtype, M * N);
  const cpu::RowProducts product{.x = {x.bytes.data(), dtype, K},
                                 .b = {b.bytes.data(), dtype, stride, mask, stride},
                                 .b_as_it_lies = as_it_lies,
                                 .compute = dtype,
                                 .scale = 1.0f,
                                 .addend = nullptr,
                                 .addend_stride = 0,
                                 .out = out.bytes.data(),
                                 .dtype = dtype,
                                 .M = M,
                                 .N = N,
                                 .K = K};
  check(out, [&] { cpu::row_products(product, 0, N); });
}

void check_all(DType dtype) {
  for (const std::int64_t M : {1, 2, 3, 5}) {
    for (const auto& [N, K] : {std::pair{7, 96}, {19, 160}, {1, 512}, {65, 512}, {33, 288}, {17, 4096 + 96}}) {
      for (const bool double_quant : {false, true}) check_few_rows(M, N, K, dtype, double_quant);
    }
  }
  for (const float scale : {1.0f, 0.5f}) {
    for (const bool x_as_it_lies : {true, false}) {
      for (const std::int64_t M : {13, 20}) {  // less than a tile of 16 rows, and more
        for (const std::int64_t R : {1, 45, 257}) {
          check_matmul(cpu::Term::Kind::Dense, x_as_it_lies, scale, M, R, 75, dtype);
          check_matmul(cpu::Term::Kind::Weight, x_as_it_lies, scale, M, R, 96, dtype);
        }
        check_matmul(cpu::Term::Kind::WeightTransposed, x_as_it_lies, scale, M, 288, 75, dtype);
      }
    }
  }
  for (const auto& [N, K] : {std::pair{5, 33}, {16, 17}, {17, 31}}) {
    for (const bool as_it_lies : {false, true}) {
      for (const bool masked : {false, true}) check_row_products(N, K, as_it_lies, masked, dtype);
    }
  }
}

}  // namespace

int main() {
  for (const auto& path : cpu::path_names()) {
    cpu::set_path(path);
    for (DType dtype : {DType::Float32, DType::BFloat16}) check_all(dtype);
  }
  return failures();
}
