// No kernel reads or writes beyond its operands: each lies between pages that end the process if they are touched. Nor
// does one write to other parts of a result than its own, which may be another thread's.
#include <algorithm>
#include <cstring>
#include <vector>

#include "adamw.h"
#include "check.h"
#include "cpu/adamw.h"
#include "cpu/dropout_mask.h"
#include "cpu/linear_4bit_dgrad.h"
#include "cpu/matmul.h"
#include "cpu/path.h"
#include "cpu/row_products.h"
#include "guarded.h"
#include "weight.h"

using namespace qlora;

namespace {

constexpr DType kAll[] = {DType::Float32, DType::Float16, DType::BFloat16};

Guarded guarded(const Values& values, Guard guard) { return {values.bytes, guard}; }

struct GuardedWeight {
  Guarded packed, absmax, nested_absmax, offset;
  Packed4bit view;

  GuardedWeight(const Weight& w, Guard guard)
      : packed(w.packed, guard),
        absmax(w.scales ? Guarded(w.scales->codes, guard) : Guarded(w.absmax, guard)),
        nested_absmax(w.scales ? w.scales->nested_absmax : std::vector<float>{}, guard),
        offset(std::vector<float>{w.scales ? w.scales->offset : 0}, guard),
        view{packed.as<std::uint8_t>(),
             absmax.data(),
             w.scales ? nested_absmax.as<float>() : nullptr,
             w.scales ? offset.as<float>() : nullptr,
             w.view.quant_type,
             w.view.blocksize} {}
};

void check_few_rows(std::int64_t M, const Weight& weight, std::int64_t N, std::int64_t K, DType dtype, Guard guard) {
  if (M > cpu::most_few_rows(dtype)) return;
  const GuardedWeight w(weight, guard);
  const Guarded x = guarded(Values(dtype, M * K), guard), y = guarded(Values(dtype, M * N), guard);
  const Guarded addend = guarded(Values(DType::Float32, M * N), guard);
  const auto bytes = static_cast<std::size_t>(cpu::arranged_bytes(dtype, M, N, K));  // a multiple of 64
  const Guarded arranged(std::vector<std::uint8_t>(bytes), guard);
  cpu::arrange_x(x.data(), dtype, M, N, K, arranged.data());
  cpu::linear_4bit({arranged.data(), w.view, addend.as<float>(), N, y.data(), M, N, K, dtype}, 0, N);
}

void check_few_rows_of_grad(std::int64_t M, const Weight& weight, std::int64_t N, std::int64_t K, DType dtype,
                            Guard guard) {
  if (M > cpu::most_few_rows_of_grad(dtype, K)) return;
  const GuardedWeight w(weight, guard);
  const DType of_grad = cpu::dtype_of_grad(dtype);
  const std::int64_t stride = of_grad == DType::BFloat16 ? N + N % 2 : N;
  const Guarded grad = guarded(Values(of_grad, M * stride), guard), grad_x = guarded(Values(dtype, M * K), guard);
  const Guarded addend = guarded(Values(DType::Float32, M * K), guard);
  cpu::linear_4bit_dgrad({grad.data(), stride, w.view, addend.as<float>(), grad_x.data(), M, N, K, dtype}, 0, K);
}

// x @ W^T or x @ W, and a dense product of few columns in the reduction, which counts everywhere or where a mask is.
void check_matmul(std::int64_t M, const Weight& weight, std::int64_t N, std::int64_t K, bool transposed, DType dtype,
                  Guard guard) {
  if (!cpu::has_matmul(dtype)) return;
  const GuardedWeight w(weight, guard);
  const std::int64_t R = transposed ? K : N, J = transposed ? N : K, rank = 3;
  const std::vector<std::uint8_t> coins(static_cast<std::size_t>(M * J), 1),
      of_dense(static_cast<std::size_t>(rank * J));
  const Guarded x = guarded(Values(dtype, M * R), guard), bias = guarded(Values(dtype, J), guard);
  const Guarded u = guarded(Values(dtype, M * rank), guard), v = guarded(Values(dtype, rank * J), guard);
  const Guarded out = guarded(Values(dtype, M * J), guard), out_mask(coins, guard), mask(of_dense, guard);
  for (const auto& [row_stride, column_stride] : {std::pair{J, std::int64_t{1}}, std::pair{std::int64_t{1}, rank}}) {
    for (const int masks : {0, 1, 2, 3}) {
      cpu::Term terms[2] = {};
      terms[0].R = R;
      terms[0].x = {x.data(), dtype, R, 1};
      terms[0].kind = transposed ? cpu::Term::Kind::WeightTransposed : cpu::Term::Kind::Weight;
      terms[0].w = w.view;
      terms[1].R = rank;
      terms[1].x = {u.data(), dtype, rank, 1};
      terms[1].kind = cpu::Term::Kind::Dense;
      terms[1].dense = {v.data(), dtype, row_stride, column_stride, masks & 1 ? mask.as<bool>() : nullptr};
      terms[1].out_mask = masks & 2 ? out_mask.as<bool>() : nullptr;
      const DType compute = dtype == DType::BFloat16 ? dtype : DType::Float32;
      const cpu::Matmul product{M, J, terms, 2, bias.data(), out.data(), dtype, compute};
      const Guarded arranged(std::vector<float>(static_cast<std::size_t>(cpu::arranged_floats(product, M))), guard);
      const cpu::MatmulRows rows{0, M, arranged.as<float>()};
      cpu::arrange_rows(product, rows, 0, M);
      cpu::matmul(product, rows, {0, M, 0, J});
    }
  }
}

void check_row_products(std::int64_t M, std::int64_t N, std::int64_t K, DType of_x, DType of_b, Guard guard) {
  const Guarded x = guarded(Values(of_x, M * K), guard), b = guarded(Values(of_b, N * K), guard);
  const Guarded out = guarded(Values(of_x, M * N), guard), addend = guarded(Values(DType::Float32, N), guard);
  const Guarded mask(std::vector<std::uint8_t>(static_cast<std::size_t>(N * K), 1), guard);
  for (const DType compute : {DType::Float32, DType::BFloat16}) {
    for (const bool as_it_lies : {false, true}) {
      for (const bool* of_mask : {static_cast<const bool*>(nullptr), static_cast<const bool*>(mask.as<bool>())}) {
        const std::int64_t stride = as_it_lies ? N : K;
        cpu::row_products({.x = {x.data(), of_x, K},
                           .b = {b.data(), of_b, stride, of_mask, stride},
                           .b_as_it_lies = as_it_lies,
                           .compute = compute,
                           .scale = 0.5f,
                           .addend = addend.as<float>(),
                           .addend_stride = 0,
                           .out = out.data(),
                           .dtype = of_x,
                           .M = M,
                           .N = N,
                           .K = K},
                          0, N);
      }
    }
  }
}

void check_codec(std::int64_t n, std::int64_t blocksize, DType dtype, QuantType quant_type, Guard guard) {
  const std::int64_t blocks = (n + blocksize - 1) / blocksize;
  const Guarded weight = guarded(Values(dtype, n), guard), values = guarded(Values(dtype, n), guard);
  const Guarded packed(std::vector<std::uint8_t>(static_cast<std::size_t>((n + 1) / 2)), guard);
  const Guarded absmax(std::vector<float>(static_cast<std::size_t>(blocks)), guard);
  cpu::quantize_4bit(weight.data(), dtype, n, blocksize, quant_type, 0, blocks, packed.as<std::uint8_t>(),
                     absmax.as<float>());
  const Packed4bit w{packed.as<std::uint8_t>(), absmax.data(), nullptr, nullptr, quant_type, blocksize};
  for (const bool past_caches : {false, true}) cpu::dequantize_4bit(w, 0, n, dtype, values.data(), past_caches);
  const std::int64_t groups = (blocks + kNestedBlocksize - 1) / kNestedBlocksize;
  const Guarded codes(std::vector<std::uint8_t>(static_cast<std::size_t>(blocks)), guard);
  const Guarded nested(std::vector<float>(static_cast<std::size_t>(groups)), guard);
  const Guarded sums(std::vector<double>(static_cast<std::size_t>(groups)), guard);
  cpu::sum_absmax(absmax.as<float>(), blocks, 0, groups, sums.as<double>());
  cpu::quantize_absmax(absmax.as<float>(), blocks, 0.1f, 0, groups, codes.as<std::uint8_t>(), nested.as<float>());
}

void check_adamw(std::int64_t count, DType param_dtype, DType grad_dtype, bool is_8bit, Guard guard) {
  const auto elements = static_cast<std::size_t>(count), blocks = (elements + kAdamwBlock - 1) / kAdamwBlock;
  AdamwHyper hyper{1e-3, 0.9, 0.999, 1e-8, 0.01, 1, false};
  const Guarded param = guarded(Values(param_dtype, count), guard), grad = guarded(Values(grad_dtype, count), guard);
  const std::vector<std::uint8_t> state(elements * (is_8bit ? 1 : 4));
  const Guarded exp_avg(state, guard), exp_avg_sq(state, guard);
  const Guarded exp_avg_absmax(std::vector<float>(blocks), guard), exp_avg_sq_absmax(std::vector<float>(blocks), guard);
  const AdamwSlice slice{.param = param.data(),
                         .grad = grad.data(),
                         .param_dtype = param_dtype,
                         .grad_dtype = grad_dtype,
                         .count = count,
                         .first = 0,
                         .index = 0,
                         .exp_avg = exp_avg.data(),
                         .exp_avg_sq = exp_avg_sq.data(),
                         .exp_avg_absmax = is_8bit ? exp_avg_absmax.as<float>() : nullptr,
                         .exp_avg_sq_absmax = is_8bit ? exp_avg_sq_absmax.as<float>() : nullptr,
                         .hyper = &hyper};
  cpu::adamw(&slice, 1, {.stochastic_rounding = true, .seed = 1}, 0, adamw_blocks(slice));
}

void check_all(Guard guard) {
  for (const DType dtype : kAll) {
    for (const bool double_quant : {false, true}) {
      for (const auto& [N, K, blocksize] : {std::tuple{1, 32, 32}, std::tuple{15, 96, 32}, std::tuple{16, 160, 32},
                                            std::tuple{17, 64, 64}, std::tuple{31, 224, 32}, std::tuple{33, 384, 128},
                                            std::tuple{3, 4096 + 288, 32}, std::tuple{18, 8192, 64}}) {
        const Weight w(N, K, blocksize, QuantType::NF4, double_quant);
        for (const std::int64_t M : {1, 2, 3, 4, 5, 8, 9, 17}) {
          check_few_rows(M, w, N, K, dtype, guard);
          check_few_rows_of_grad(M, w, N, K, dtype, guard);
        }
        for (const std::int64_t M : {1, 13}) {
          for (const bool transposed : {false, true}) check_matmul(M, w, N, K, transposed, dtype, guard);
        }
      }
    }
    for (const DType of_b : kAll) {
      for (const std::int64_t N : {1, 15, 16, 17, 33}) {
        for (const std::int64_t K : {1, 15, 16, 17, 31, 32, 33, 300}) check_row_products(3, N, K, dtype, of_b, guard);
      }
      for (const std::int64_t count : {1, 256, 300}) {
        for (const bool is_8bit : {false, true}) check_adamw(count, dtype, of_b, is_8bit, guard);
      }
    }
    for (const QuantType quant_type : {QuantType::NF4, QuantType::FP4}) {
      for (const std::int64_t blocksize : {32, 64, 128}) {
        for (const std::int64_t n : {1, 31, 2048, 2080, 16 * 128 * 40 - 1})
          check_codec(n, blocksize, dtype, quant_type, guard);
      }
    }
  }
  for (const std::int64_t n : {1, 256, 300}) {
    const Guarded kept(std::vector<std::uint8_t>(static_cast<std::size_t>(n)), guard);
    cpu::dropout_mask(1, 1u << 31, n, 0, (n + 255) / 256, kept.as<bool>());
  }
}

// --- parts --------------------------------------------------------------------------------------------------------

// Of a result [*, columns], all but columns [begin, end) are as before.
void check_others(const Values& result, std::int64_t columns, std::int64_t begin, std::int64_t end) {
  for (std::int64_t i = 0; i < static_cast<std::int64_t>(result.exact.size()); ++i) {
    if (i % columns < begin || i % columns >= end) CHECK_EQ(result.read(i), result.exact[static_cast<std::size_t>(i)]);
  }
}

void check_parts(std::int64_t M, DType dtype) {
  constexpr std::int64_t N = 37, K = 416, kBlock = 32;
  const Weight w(N, K, kBlock, QuantType::NF4, false);
  const Values x(dtype, M * K), grad(cpu::dtype_of_grad(dtype), M * (N + 1));
  for (const auto& [begin, end] : {std::pair{0, 3}, {3, 16}, {16, 32}, {32, 37}, {34, 36}}) {
    Values y(dtype, M * N), out = y;
    cpu::row_products({.x = {x.bytes.data(), dtype, K},
                       .b = {x.bytes.data(), dtype, 0},
                       .b_as_it_lies = false,
                       .compute = dtype,
                       .scale = 1.0f,
                       .addend = nullptr,
                       .addend_stride = 0,
                       .out = out.bytes.data(),
                       .dtype = dtype,
                       .M = M,
                       .N = N,
                       .K = K},
                      begin, end);
    check_others(out, N, begin, end);
    if (M > cpu::most_few_rows(dtype)) continue;
    const auto arranged = room_for_x(dtype, M, N, K);
    cpu::arrange_x(x.bytes.data(), dtype, M, N, K, arranged.get());
    cpu::linear_4bit({arranged.get(), w.view, nullptr, 0, y.bytes.data(), M, N, K, dtype}, begin, end);
    check_others(y, N, begin, end);
  }
  for (const auto& [begin, end] : {std::pair{0, 128}, {128, 384}, {384, 416}}) {
    if (M > cpu::most_few_rows_of_grad(dtype, K)) continue;
    Values grad_x(dtype, M * K);
    cpu::linear_4bit_dgrad({grad.bytes.data(), N + 1, w.view, nullptr, grad_x.bytes.data(), M, N, K, dtype}, begin,
                           end);
    check_others(grad_x, K, begin, end);
  }
}

// Parts of the rows are arranged as all are, in any order; so are rectangles of a product.
void check_parts_of_matmul(bool transposed, DType dtype) {
  if (!cpu::has_matmul(dtype)) return;
  constexpr std::int64_t M = 43, R = 45, J = 75;  // unfinished tiles, steps and panels
  const Values x(dtype, M * R), b(dtype, R * J);
  cpu::Term term{};
  term.R = R;
  term.x = {x.bytes.data(), dtype, transposed ? 1 : R, transposed ? M : 1};
  term.kind = cpu::Term::Kind::Dense;
  term.dense = {b.bytes.data(), dtype, J, 1};
  Values out(dtype, M * J);
  const cpu::Matmul product{M, J, &term, 1, nullptr, out.bytes.data(), dtype, dtype};
  std::vector<float> whole(static_cast<std::size_t>(cpu::arranged_floats(product, M))), parts(whole.size(), NAN);
  cpu::arrange_rows(product, {0, M, whole.data()}, 0, M);
  const std::int64_t step = cpu::row_boundary(product);
  for (std::int64_t begin = (M - 1) / step * step; begin >= 0; begin -= step) {
    cpu::arrange_rows(product, {0, M, parts.data()}, begin, std::min(begin + step, M));
  }
  CHECK(std::memcmp(whole.data(), parts.data(), whole.size() * sizeof(float)) == 0);
  for (const auto& [begin, end] : {std::pair{0, 32}, {32, 64}, {64, 75}}) {
    Values part(dtype, M * J);
    cpu::Matmul of_part = product;
    of_part.out = part.bytes.data();
    cpu::matmul(of_part, {0, M, whole.data()}, {0, M, begin, end});
    check_others(part, J, begin, end);
  }
}

}  // namespace

int main() {
  for (const auto& path : cpu::path_names()) {
    cpu::set_path(path);
    for (const Guard guard : {Guard::Behind, Guard::Before}) check_all(guard);
    for (const DType dtype : {DType::Float32, DType::BFloat16}) {
      for (const std::int64_t M : {1, 3, 9}) check_parts(M, dtype);
      for (const bool transposed : {false, true}) check_parts_of_matmul(transposed, dtype);
    }
  }
  return failures();
}
