// linear_4bit and its gradient for few rows, and matmul, on every path: as exact as sums in fp32 are, and the same
// bytes however the work is cut.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <vector>

#include "check.h"
#include "cpu/linear_4bit.h"
#include "cpu/linear_4bit_dgrad.h"
#include "cpu/matmul_blocks.h"
#include "cpu/path.h"
#include "weight.h"

using namespace qlora;

namespace {

#ifdef QLORA_EXT_PORTABLE_MATMUL
constexpr bool kPortableMatmul = true;
#else
constexpr bool kPortableMatmul = false;
#endif

// How far a result may be from the exact one, whose terms' absolute values add up to `magnitude`: the sum's rounding in
// fp32 (or of factors in bf16), and the rounding of the result.
double allowed(bool in_bf16, DType out, double magnitude, double exact) {
  const double of_out = out == DType::Float32 ? 0x1p-24 : out == DType::Float16 ? 0x1p-11 : 0x1p-8;
  return magnitude * (in_bf16 ? 0x1p-8 : 0x1p-21) + std::fabs(exact) * of_out + 1e-7;
}

bool matmul_in_bf16(DType compute) { return compute == DType::BFloat16 && cpu::path() >= cpu::Path::Avx512Bf16; }

// Without instructions for bf16 AVX2 rounds the codes, as that halves their lookups, and AVX512 nothing.
bool few_rows_in_bf16(DType dtype) {
  return matmul_in_bf16(dtype) || (dtype == DType::BFloat16 && cpu::path() == cpu::Path::Avx2);
}

void check_few_rows(std::int64_t M, std::int64_t N, std::int64_t K, std::int64_t blocksize, DType dtype,
                    QuantType quant_type, bool double_quant) {
  if (M > cpu::most_few_rows(dtype)) return;
  const Weight w(N, K, blocksize, quant_type, double_quant);
  const Values x(dtype, M * K), addend(DType::Float32, M * N);
  Values y(dtype, M * N), in_parts(dtype, M * N);
  const auto arranged = room_for_x(dtype, M, N, K);
  cpu::arrange_x(x.bytes.data(), dtype, M, N, K, arranged.get());
  const auto* added = reinterpret_cast<const float*>(addend.bytes.data());
  for (const std::int64_t stride : {std::int64_t{0}, N}) {
    cpu::FewRows product{arranged.get(), w.view, added, stride, y.bytes.data(), M, N, K, dtype};
    cpu::linear_4bit(product, 0, N);
    product.y = in_parts.bytes.data();
    for (const std::int64_t step : {3, 19}) {  // less than a tile, and one with a rest
      for (std::int64_t n = 0; n < N; n += step) cpu::linear_4bit(product, n, std::min(n + step, N));
      CHECK(y.bytes == in_parts.bytes);
      std::fill(in_parts.bytes.begin(), in_parts.bytes.end(), std::uint8_t{0});
    }
    for (std::int64_t m = 0; m < M; ++m) {
      for (std::int64_t n = 0; n < N; ++n) {
        double exact = addend.read(m * stride + n), magnitude = std::fabs(exact);
        for (std::int64_t k = 0; k < K; ++k) {
          const double term =
              x.exact[static_cast<std::size_t>(m * K + k)] * w.decoded[static_cast<std::size_t>(n * K + k)];
          exact += term;
          magnitude += std::fabs(term);
        }
        CHECK(std::fabs(y.read(m * N + n) - exact) <= allowed(few_rows_in_bf16(dtype), dtype, magnitude, exact));
      }
    }
  }
}

// What lies between two rows of grad, behind the zero of an odd N, is not a number.
std::int64_t stride_of_grad(std::int64_t N) { return N + N % 2 + 2; }

Values rows_of_grad(std::int64_t M, std::int64_t N, DType dtype) {
  const std::int64_t stride = stride_of_grad(N);
  Values grad(cpu::dtype_of_grad(dtype), M * stride);
  for (std::int64_t m = 0; m < M; ++m) {
    for (std::int64_t n = N; n < stride; ++n) grad.set(m * stride + n, n < N + N % 2 ? 0.0f : NAN);
  }
  return grad;
}

void check_few_rows_of_grad(std::int64_t M, std::int64_t N, std::int64_t K, std::int64_t blocksize, DType dtype,
                            QuantType quant_type, bool double_quant) {
  if (M > cpu::most_few_rows_of_grad(dtype, K)) return;
  const Weight w(N, K, blocksize, quant_type, double_quant);
  const std::int64_t stride = stride_of_grad(N);
  const Values grad = rows_of_grad(M, N, dtype), addend(DType::Float32, M * K);
  Values grad_x(dtype, M * K), in_parts(dtype, M * K);
  const auto* added = M % 3 == 2 ? nullptr : reinterpret_cast<const float*>(addend.bytes.data());
  cpu::FewRowsDgrad product{grad.bytes.data(), stride, w.view, added, grad_x.bytes.data(), M, N, K, dtype};
  cpu::linear_4bit_dgrad(product, 0, K);
  product.grad_x = in_parts.bytes.data();
  for (const std::int64_t step : {cpu::kDgradBoundary, 3 * cpu::kDgradBoundary}) {
    for (std::int64_t k = (K - 1) / step * step; k >= 0; k -= step) {  // none writes to those behind it
      cpu::linear_4bit_dgrad(product, k, std::min(k + step, K));
    }
    CHECK(grad_x.bytes == in_parts.bytes);
    std::fill(in_parts.bytes.begin(), in_parts.bytes.end(), std::uint8_t{0});
  }
  for (std::int64_t m = 0; m < M; ++m) {
    for (std::int64_t k = 0; k < K; ++k) {
      double exact = added == nullptr ? 0 : addend.read(m * K + k), magnitude = std::fabs(exact);
      for (std::int64_t n = 0; n < N; ++n) {
        const float weight = w.decoded[static_cast<std::size_t>(n * K + k)];
        const double multiplied = matmul_in_bf16(dtype) ? to_float(round_to<BFloat16>(weight)) : weight;
        const double term = grad.exact[static_cast<std::size_t>(m * stride + n)] * multiplied;
        exact += term;
        magnitude += std::fabs(term);
      }
      CHECK(std::fabs(grad_x.read(m * K + k) - exact) <= allowed(false, dtype, magnitude, exact));
    }
  }
}

// A block that is not finite must not reach its neighbours, nor what lies behind the last column.
void check_columns(std::int64_t M, DType dtype) {
  constexpr std::int64_t N = 9, K = 224, kBlock = 32, kBad = 6;  // the last block but one of a row, in its second chunk
  if (M > cpu::most_few_rows_of_grad(dtype, K)) return;
  Weight w(N, K, kBlock, QuantType::NF4, false);
  w.absmax[static_cast<std::size_t>(2 * K / kBlock + kBad - 1)] = std::numeric_limits<float>::infinity();
  const Values grad = rows_of_grad(M, N, dtype);
  Values grad_x(dtype, (M + 1) * K);
  cpu::linear_4bit_dgrad({grad.bytes.data(), stride_of_grad(N), w.view, nullptr, grad_x.bytes.data(), M, N, K, dtype},
                         0, K);
  for (std::int64_t i = 0; i < M * K; ++i) CHECK(std::isfinite(grad_x.read(i)) == (i % K / kBlock != kBad - 1));
  for (std::int64_t i = M * K; i < (M + 1) * K; ++i) {
    CHECK_EQ(grad_x.read(i), grad_x.exact[static_cast<std::size_t>(i)]);  // as it was
  }
}

// x = 1 shows a bias of the codes in 16 bits, which adds up over K: at most twice the error of a sum of weights that
// are rounded to bf16.
void check_mean() {
  constexpr std::int64_t N = 24, K = 14336;
  if (cpu::most_few_rows(DType::BFloat16) == 0) return;
  const Weight w(N, K, 64, QuantType::NF4, true);
  Values x(DType::BFloat16, K), y(DType::BFloat16, N);
  for (std::int64_t k = 0; k < K; ++k) x.set(k, 1.0f);
  const auto arranged = room_for_x(DType::BFloat16, 1, N, K);
  cpu::arrange_x(x.bytes.data(), DType::BFloat16, 1, N, K, arranged.get());
  cpu::linear_4bit({arranged.get(), w.view, nullptr, 0, y.bytes.data(), 1, N, K, DType::BFloat16}, 0, N);
  double error = 0, plain_error = 0, largest = 0;
  for (std::int64_t n = 0; n < N; ++n) {
    double exact = 0, plain = 0;
    for (std::int64_t k = 0; k < K; ++k) {
      const float weight = w.decoded[static_cast<std::size_t>(n * K + k)];
      exact += weight;
      plain += to_float(round_to<BFloat16>(weight));
    }
    error = std::max(error, std::fabs(y.read(n) - exact));
    plain_error = std::max(plain_error, std::fabs(to_float(round_to<BFloat16>(static_cast<float>(plain))) - exact));
    largest = std::max(largest, std::fabs(exact));
  }
  CHECK(error <= 2 * plain_error + 0x1p-7 * largest);
}

// A row that is not finite must not reach its neighbours: a chunk goes on beyond the end of a row, and a tile has 16.
void check_neighbours(std::int64_t M, DType dtype) {
  constexpr std::int64_t N = 19, K = 96, kBad = 2;
  if (M > cpu::most_few_rows(dtype)) return;
  Weight w(N, K, 32, QuantType::NF4, false);
  for (std::int64_t block = kBad * K / 32; block < (kBad + 1) * K / 32; ++block) {
    w.absmax[static_cast<std::size_t>(block)] = std::numeric_limits<float>::infinity();
  }
  const Values x(dtype, M * K);
  Values y(dtype, M * N);
  const auto arranged = room_for_x(dtype, M, N, K);
  cpu::arrange_x(x.bytes.data(), dtype, M, N, K, arranged.get());
  cpu::linear_4bit({arranged.get(), w.view, nullptr, 0, y.bytes.data(), M, N, K, dtype}, 0, N);
  for (std::int64_t i = 0; i < M * N; ++i) CHECK(std::isfinite(y.read(i)) == (i % N != kBad));
}

// Each block begins with its largest weight, whose code is 1. Of a row of x that is 1 there and 0 elsewhere y is absmax
// itself, so that one of another block or group is seen. Groups of 256 blocks begin within rows of W.
void check_absmax(std::int64_t M, std::int64_t blocks_of_row, DType dtype) {
  constexpr std::int64_t N = 18, kBlock = 64;
  if (M > cpu::most_few_rows(dtype)) return;
  const std::int64_t K = blocks_of_row * kBlock;
  Values values(DType::Float32, N * K, 0.1f);
  for (std::int64_t block = 0; block < N * blocks_of_row; ++block) {
    values.set(block * kBlock, static_cast<float>((1 + block % 7) * (1 + 10 * (block / kNestedBlocksize % 3))));
  }
  const Weight w(values, N * K, kBlock, QuantType::NF4, true);
  const auto arranged = room_for_x(dtype, M, N, K);
  for (std::int64_t first = 0; first < blocks_of_row; first += M) {
    Values x(dtype, M * K, 0.0f), y(dtype, M * N);
    const auto block = [&](std::int64_t m) { return std::min(first + m, blocks_of_row - 1); };
    for (std::int64_t m = 0; m < M; ++m) x.set(m * K + block(m) * kBlock, 1.0f);
    cpu::arrange_x(x.bytes.data(), dtype, M, N, K, arranged.get());
    cpu::linear_4bit({arranged.get(), w.view, nullptr, 0, y.bytes.data(), M, N, K, dtype}, 0, N);
    Values absmax(dtype, 1);
    for (std::int64_t i = 0; i < M * N; ++i) {
      absmax.set(0, w.decoded[static_cast<std::size_t>(i % N * K + block(i / N) * kBlock)]);
      CHECK_EQ(y.read(i), absmax.read(0));
    }
  }
}

// All of out, in rectangles of at most so many rows, a multiple of their boundary, and columns.
void multiply(const cpu::Matmul& product, std::int64_t rows_each, std::int64_t columns_each) {
  const std::int64_t most = cpu::most_matmul_rows(product);
  for (std::int64_t first = 0; first < product.M; first += most) {
    const std::int64_t last = std::min(first + most, product.M);
    std::vector<float> x(static_cast<std::size_t>(cpu::arranged_floats(product, last - first)));
    const cpu::MatmulRows rows{first, last, x.data()};
    const auto each_part = [&](auto&& handle) {
      for (std::int64_t m = first; m < last; m += rows_each) handle(m, std::min(m + rows_each, last));
    };
    each_part([&](std::int64_t begin, std::int64_t end) { cpu::arrange_rows(product, rows, begin, end); });
    each_part([&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t j = 0; j < product.J; j += columns_each) {
        cpu::matmul(product, rows, {begin, end, j, std::min(j + columns_each, product.J)});
      }
    });
  }
}

// out = mask * (u @ v) + other_mask * (u @ v) + x @ W^T (or x @ W) + bias, where u and v are strided, v once by columns
// and once by rows, and x has a mask. Where a mask is false there may be NaN. Not masked, u @ v counts everywhere.
void check_matmul(bool transposed, std::int64_t M, std::int64_t N, std::int64_t K, std::int64_t blocksize, DType dtype,
                  QuantType quant_type, bool masked) {
  if (!cpu::has_matmul(dtype)) return;
  const Weight w(N, K, blocksize, quant_type, M % 3 != 0);
  const std::int64_t R = transposed ? K : N, J = transposed ? N : K, rank = M % 2 == 0 ? 5 : 300;
  const Values u(dtype, rank * M), bias(dtype, J);
  Values x(dtype, M * R), v(DType::Float32, J * rank), v_by_rows(DType::Float32, rank * J);
  for (std::int64_t r = 0; r < rank; ++r) {
    if (masked) v.set(r, NAN);  // column 0
    for (std::int64_t j = 0; j < J; ++j) v_by_rows.set(r * J + j, static_cast<float>(v.read(j * rank + r)));
  }
  std::vector<std::uint8_t> coins(static_cast<std::size_t>(M * (R + 2 * J)));
  for (auto& coin : coins) coin = generator() % 3 != 0;
  for (std::int64_t row = 0; row < 2 * M; ++row) coins[static_cast<std::size_t>(M * R + row * J)] = 0;
  const auto* x_mask = reinterpret_cast<const bool*>(coins.data());
  for (std::int64_t i = 0; i < M * R; ++i) {
    if (!x_mask[i]) x.set(i, NAN);
  }
  cpu::Term terms[3] = {};
  terms[0].R = rank;
  terms[0].x = {u.bytes.data(), dtype, 1, M};
  terms[0].kind = cpu::Term::Kind::Dense;
  terms[0].dense = {v.bytes.data(), DType::Float32, 1, rank};
  terms[0].scale = 0.5f;
  if (masked) terms[0].out_mask = x_mask + M * R;
  terms[1] = terms[0];
  terms[1].dense = {v_by_rows.bytes.data(), DType::Float32, J, 1};
  if (masked) terms[1].out_mask = terms[0].out_mask + M * J;
  terms[2].R = R;
  terms[2].x = {x.bytes.data(), dtype, R, 1, x_mask};
  terms[2].kind = transposed ? cpu::Term::Kind::WeightTransposed : cpu::Term::Kind::Weight;
  terms[2].w = w.view;
  Values out(dtype, M * J), in_parts(dtype, M * J);
  const DType compute = dtype == DType::BFloat16 ? dtype : DType::Float32;
  cpu::Matmul product{M, J, terms, 3, bias.bytes.data(), out.bytes.data(), dtype, compute};
  multiply(product, cpu::most_matmul_rows(product), J);
  product.out = in_parts.bytes.data();
  for (const std::int64_t panels : {1, 3}) {
    multiply(product, cpu::row_boundary(product), panels * cpu::kMatmulColumnBoundary);
    CHECK(out.bytes == in_parts.bytes);
    std::fill(in_parts.bytes.begin(), in_parts.bytes.end(), std::uint8_t{0});
  }
  for (std::int64_t m = 0; m < M; ++m) {
    for (std::int64_t j = 0; j < J; ++j) {
      double exact = bias.exact[static_cast<std::size_t>(j)], magnitude = std::fabs(exact);
      for (std::int64_t r = 0; r < R; ++r) {
        if (!x_mask[m * R + r]) continue;
        const std::int64_t at = transposed ? j * K + r : r * K + j;
        const double term = x.exact[static_cast<std::size_t>(m * R + r)] * w.decoded[static_cast<std::size_t>(at)];
        exact += term;
        magnitude += std::fabs(term);
      }
      const auto part = [&](const cpu::Term& term) { return !masked || term.out_mask[m * J + j] ? 0.5 : 0; };
      const double times = part(terms[0]) + part(terms[1]);
      for (std::int64_t r = 0; r < rank && times != 0; ++r) {
        const double term =
            times * u.exact[static_cast<std::size_t>(r * M + m)] * v.exact[static_cast<std::size_t>(j * rank + r)];
        exact += term;
        magnitude += std::fabs(term);
      }
      CHECK(std::fabs(out.read(m * J + j) - exact) <= allowed(matmul_in_bf16(dtype), dtype, magnitude, exact));
    }
  }
}

// A product without a 4-bit weight and out of another dtype, as the adapters' gradients are.
void check_dense(std::int64_t M, std::int64_t R, std::int64_t J, bool columns_lie, DType compute) {
  if (!cpu::has_matmul(compute)) return;
  const std::int64_t row_stride = columns_lie ? 2 : J, column_stride = columns_lie ? 2 * R : 1;
  const Values x(DType::Float32, R * M);
  const std::int64_t numbers = columns_lie ? 2 * R * J : R * J;
  Values b(DType::BFloat16, numbers);
  std::vector<std::uint8_t> coins(static_cast<std::size_t>(numbers));
  for (auto& coin : coins) coin = generator() % 2;
  const auto* mask = reinterpret_cast<const bool*>(coins.data());
  for (std::int64_t i = 0; i < numbers; ++i) {
    if (!mask[i]) b.set(i, NAN);
  }
  cpu::Term term{};
  term.R = R;
  term.x = {x.bytes.data(), DType::Float32, 1, M};
  term.kind = cpu::Term::Kind::Dense;
  term.dense = {b.bytes.data(), DType::BFloat16, row_stride, column_stride, mask};
  Values out(DType::Float32, M * J);
  const cpu::Matmul product{M, J, &term, 1, nullptr, out.bytes.data(), DType::Float32, compute};
  multiply(product, cpu::most_matmul_rows(product), J);
  for (std::int64_t m = 0; m < M; ++m) {
    for (std::int64_t j = 0; j < J; ++j) {
      double exact = 0, magnitude = 0;
      for (std::int64_t r = 0; r < R; ++r) {
        const std::int64_t at = r * row_stride + j * column_stride;
        if (!mask[at]) continue;
        const double product = x.exact[static_cast<std::size_t>(r * M + m)] * b.exact[static_cast<std::size_t>(at)];
        exact += product;
        magnitude += std::fabs(product);
      }
      CHECK(std::fabs(out.read(m * J + j) - exact) <=
            allowed(matmul_in_bf16(compute), DType::Float32, magnitude, exact));
    }
  }
}

}  // namespace

int main() {
  for (const auto& path : cpu::path_names()) {
    cpu::set_path(path);
    CHECK_EQ(cpu::has_matmul(DType::Float32), path != "portable" || kPortableMatmul);
    CHECK_EQ(cpu::has_matmul(DType::BFloat16), cpu::has_matmul(DType::Float32) && !cpu::torch_has_bf16_matrices());
    for (DType dtype : {DType::Float32, DType::Float16, DType::BFloat16}) {
      CHECK(cpu::most_few_rows(dtype) >= 8);
      const QuantType quant_type = dtype == DType::Float16 ? QuantType::FP4 : QuantType::NF4;
      // K of whole and unfinished chunks (of 32 to 256 weights), of one and of several segments (of 512 to 4096); M of
      // one and of several groups (of at most 4, 8 or 16), even and uneven, which meet W in parts (of 1024); N of less
      // than a tile (of 16), of whole and unfinished ones; rows of 4 KB, which a tile may copy.
      for (const auto& [M, N, K, blocksize] :
           {std::tuple{1, 7, 256, 64},         std::tuple{2, 19, 96, 32},    std::tuple{3, 7, 320, 64},
            std::tuple{4, 18, 4096 + 160, 32}, std::tuple{5, 23, 512, 512},  std::tuple{6, 16, 8192, 4096},
            std::tuple{7, 33, 32, 32},         std::tuple{8, 17, 1088, 64},  std::tuple{9, 67, 128, 128},
            std::tuple{10, 16, 6144, 2048},    std::tuple{11, 18, 2144, 32}, std::tuple{12, 18, 8192, 128},
            std::tuple{13, 5, 544, 32},        std::tuple{16, 66, 192, 64},  std::tuple{31, 35, 96, 32},
            std::tuple{1, 19, 96, 32},         std::tuple{1, 16, 160, 32},   std::tuple{1, 33, 384, 128},
            std::tuple{1, 18, 4096 + 160, 32}, std::tuple{1, 17, 4224, 128}, std::tuple{1, 16, 8192, 4096},
            std::tuple{17, 19, 4288, 64},      std::tuple{24, 17, 416, 32},  std::tuple{32, 18, 4224, 128},
            std::tuple{1, 18, 4288, 64},       std::tuple{2, 7, 416, 32},    std::tuple{2, 5, 8192, 4096}}) {
        // The last in fp32: segments of half a block, where the L1 has 32 KB.
        // With double quantization, groups of 256 blocks begin within a row of the fourth.
        check_few_rows(M, N, K, blocksize, dtype, quant_type, (M % 2 == 1 && K != 4288) || M == 4 || M == 12);
      }
      // N of one and of several times 32 or 64 rows; K of whole and unfinished chunks (of 64 or 128), of one and of
      // several strips (of 1024 or 2048); M of one and of two groups (of 4, or all), of those that are not stored
      // decoded (3).
      for (const auto& [M, N, K, blocksize] :
           {std::tuple{1, 7, 256, 64}, std::tuple{1, 130, 96, 32}, std::tuple{2, 64, 32, 32},
            std::tuple{2, 9, 4160, 64}, std::tuple{3, 65, 2304, 256}, std::tuple{3, 1, 64, 64},
            std::tuple{4, 70, 2208, 32}, std::tuple{5, 6, 8192, 4096}, std::tuple{6, 129, 1152, 128},
            std::tuple{8, 67, 2208, 32}, std::tuple{9, 33, 2208, 32}, std::tuple{16, 95, 160, 32},
            std::tuple{11, 131, 2176, 32}, std::tuple{17, 66, 1280, 64}, std::tuple{32, 35, 1152, 128},
            std::tuple{17, 2113, 2176, 128}}) {
        check_few_rows_of_grad(M, N, K, blocksize, dtype, quant_type, M % 2 == 1);
      }
      if (dtype != DType::Float16) {  // rows of one segment, and of two
        for (std::int64_t M : {1, 5}) check_absmax(M, 37, dtype);
        for (std::int64_t M : {3, 8}) check_absmax(M, 67, dtype);
      }
      // N of unfinished panels and odd; K of unfinished depths (of 256); M of every unfinished tile.
      for (const bool masked : {true, false}) {
        for (std::int64_t M = 1; M <= 13; ++M) {
          check_matmul(true, M, 16 * (M % 4) + M, M % 2 == 0 ? 64 : 576, 64, dtype, quant_type, masked);
          check_matmul(false, M, 16 * (M % 4) + M, M % 2 == 0 ? 64 : 352, 32, dtype, quant_type, masked);
        }
        check_matmul(true, 37, 300, 512, 512, dtype, quant_type, masked);
        check_matmul(false, 37, 301, 512, 512, dtype, quant_type, masked);
        for (std::int64_t blocksize : {64, 128}) check_matmul(false, 5, 40, 384, blocksize, dtype, quant_type, masked);
      }
      check_matmul(true, 14, 35, 608, 32, dtype, quant_type, false);
      check_matmul(false, 14, 545, 64, 32, dtype, quant_type, true);
    }
    // More rows than are kept at a time; then of so many, blocks by two; then room for 256 columns at a time.
    check_matmul(true, 530, 33, 64, 64, DType::BFloat16, QuantType::NF4, true);
    check_matmul(true, 530, 33, 832, 64, DType::BFloat16, QuantType::NF4, false);
    check_matmul(true, 300, 290, 64, 64, DType::Float32, QuantType::NF4, true);
    check_matmul(true, 260, 512, 64, 64, DType::BFloat16, QuantType::NF4, true);
    check_mean();
    for (std::int64_t M : {1, 2, 3, 4, 7}) {
      for (DType dtype : {DType::Float32, DType::BFloat16}) check_columns(M, dtype);
    }
    for (DType dtype : {DType::Float32, DType::BFloat16}) {
      check_neighbours(1, dtype);
      check_neighbours(5, dtype);
    }
    for (DType compute : {DType::Float32, DType::BFloat16}) {  // bf16 operands do not make the product bf16
      for (const bool columns_lie : {false, true}) check_dense(16, 300, 70, columns_lie, compute);
      check_dense(3, 1, 1, false, compute);
    }
  }
  return failures();
}
