// The CPU of the ops: the kernels of cpu/, spread over torch's threads.
#include <ATen/ops/empty.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <vector>

#include "../cpu/adamw.h"
#include "../cpu/caches.h"
#include "../cpu/dequantize_4bit.h"
#include "../cpu/dropout_mask.h"
#include "../cpu/linear_4bit.h"
#include "../cpu/linear_4bit_dgrad.h"
#include "../cpu/matmul.h"
#include "../cpu/path.h"
#include "../cpu/quantize.h"
#include "../cpu/row_products.h"
#include "../random.h"
#include "check.h"
#include "device.h"
#include "few_rows_cpu.h"
#include "parallel.h"

namespace qlora {
namespace {

using at::Tensor;

constexpr int64_t kMinFlops = 1 << 20;  // of a product that more than one thread should have

class Cpu final : public Device {
 public:
  void quantize_4bit(const Tensor& weight, QuantType quant_type, int64_t blocksize, const Tensor& packed,
                     const Tensor& absmax) const override {
    const int64_t n = weight.numel();
    const DType dtype = dtype_of(weight.scalar_type());
    const void* values = weight.const_data_ptr();
    auto* bytes = packed.data_ptr<uint8_t>();
    auto* scales = absmax.data_ptr<float>();
    parallel_for(0, ceil_div(n, blocksize), ceil_div(kGrain, blocksize), [&](int64_t begin, int64_t end) {
      cpu::quantize_4bit(values, dtype, n, blocksize, quant_type, begin, end, bytes, scales);
    });
  }

  void quantize_absmax(const Tensor& absmax, const Tensor& codes, const Tensor& nested_absmax,
                       const Tensor& nested_offset) const override {
    const int64_t n = absmax.numel();
    const auto* values = absmax.const_data_ptr<float>();
    const int64_t groups = nested_absmax.numel();
    std::vector<double> sums(static_cast<size_t>(groups));
    parallel_for(0, groups, kGrain / kNestedBlocksize,
                 [&](int64_t begin, int64_t end) { cpu::sum_absmax(values, n, begin, end, sums.data()); });
    const float offset = cpu::absmax_offset(sums.data(), groups, n);
    *nested_offset.data_ptr<float>() = offset;
    auto* bytes = codes.data_ptr<uint8_t>();
    auto* scales = nested_absmax.data_ptr<float>();
    parallel_for(0, groups, kGrain / kNestedBlocksize, [&](int64_t begin, int64_t end) {
      cpu::quantize_absmax(values, n, offset, begin, end, bytes, scales);
    });
  }

  void dequantize_4bit(const Packed4bit& w, int64_t K, const Slice& slice, const Tensor& out) const override {
    const int64_t width = slice.column_end - slice.column_begin;
    const DType dtype = dtype_of(out.scalar_type());
    auto* bytes = static_cast<uint8_t*>(out.data_ptr());
    if (width == K) {  // one run of elements
      const int64_t first = slice.row_begin * K;
      const int64_t tile = std::max<int64_t>(w.blocksize, 4096);
      const int64_t tiles_end = ceil_div(slice.row_end * K - first, tile);
      const bool past_caches = static_cast<int64_t>(out.nbytes()) > cpu::l3_bytes();  // they would not keep it
      parallel_for(0, tiles_end, kGrain / tile, [&](int64_t begin, int64_t end) {
        const int64_t last = std::min(first + end * tile, slice.row_end * K);
        cpu::dequantize_4bit(w, first + begin * tile, last, dtype, bytes + begin * tile * itemsize(dtype), past_caches);
      });
      return;
    }
    parallel_for(slice.row_begin, slice.row_end, ceil_div(kGrain, width), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        cpu::dequantize_4bit(w, row * K + slice.column_begin, row * K + slice.column_end, dtype,
                             bytes + (row - slice.row_begin) * width * itemsize(dtype));
      }
    });
  }

  void adamw(const AdamwSlice* slices, int64_t n, const AdamwOptions& options, const Tensor&) const override {
    parallel_for(0, adamw_blocks(slices, n), kGrain / kAdamwBlock,
                 [&](int64_t begin, int64_t end) { cpu::adamw(slices, n, options, begin, end); });
  }

  void dropout_mask(const Tensor& seed, uint32_t kept_below, const Tensor& mask) const override {
    const int64_t n = mask.numel();
    const uint64_t key = mix(static_cast<uint64_t>(*seed.const_data_ptr<int64_t>()));
    bool* const kept = mask.data_ptr<bool>();
    parallel_for(0, ceil_div(n, kRandomBlock), kGrain / kRandomBlock,
                 [&](int64_t begin, int64_t end) { cpu::dropout_mask(key, kept_below, n, begin, end, kept); });
  }

  int64_t workspace_bytes(const Tensor&) const override { return cpu::l2_bytes(); }

  // torch multiplies bf16 well where the CPU has instructions for it, and fp16 nowhere: fp32 is faster there, and more
  // exact.
  at::ScalarType compute_dtype(at::ScalarType dtype) const override {
    return dtype == at::kHalf || (dtype == at::kBFloat16 && !cpu::has_native_bf16()) ? at::kFloat : dtype;
  }

  bool fused_linear_4bit(const Tensor& x, const Packed4bit& w, const Tensor& bias, LowRankList added,
                         const Tensor& y) const override {
    const int64_t M = x.size(0), K = x.size(1);
    const DType dtype = dtype_of(x.scalar_type());
    if (K % w.blocksize != 0) return false;
    if (M <= cpu::most_few_rows(dtype)) {
      linear_4bit_few_rows(x, w, bias, added, y);
      return true;
    }
    const DType compute = compute_in(dtype);
    if (!cpu::has_matmul(compute)) return false;
    multiply({{.R = K, .x = matrix(x), .kind = cpu::Term::Kind::WeightTransposed, .w = w}}, added, bias, compute, y);
    return true;
  }

  bool fused_linear_4bit_dgrad(const Tensor& grad, const Packed4bit& w, LowRankList added,
                               const Tensor& grad_x) const override {
    const int64_t M = grad.size(0);
    const DType dtype = dtype_of(grad.scalar_type()), compute = compute_in(dtype);
    if (grad_x.size(1) % w.blocksize != 0) return false;
    const bool masked = std::any_of(added.begin(), added.end(), [](const LowRank& one) { return one.mask.defined(); });
    if (M <= cpu::most_few_rows_of_grad(dtype, grad_x.size(1)) && !masked) {
      linear_4bit_dgrad_few_rows(grad, w, added, grad_x);
      return true;
    }
    if (!cpu::has_matmul(compute)) return false;
    multiply({{.R = grad.size(1), .x = matrix(grad), .kind = cpu::Term::Kind::Weight, .w = w}}, added, {}, compute,
             grad_x);
    return true;
  }

  Tensor mm(const MaskedMatrix& a, const MaskedMatrix& b, double scale, at::ScalarType compute,
            at::ScalarType out_dtype) const override {
    const DType type = compute_in(dtype_of(compute));
    const int64_t M = a.values.size(0), N = b.values.size(1), K = a.values.size(1);
    const bool few_rows = M <= cpu::kMostRowProducts, few_columns = N <= cpu::kMostRowProducts;
    const bool by_rows = few_rows && !a.mask.defined();
    if (!cpu::has_matmul(type)) {
      // Few rows' xA: torch's product for all adapters at once may be less exact than those for each.
      constexpr int64_t kFewRowsOfXA = 16;
      const bool is_xA = by_rows && M <= kFewRowsOfXA && few_columns && type == DType::Float32;
      if (!is_xA) return Device::mm(a, b, scale, compute, out_dtype);
    }
    // As out^T = b^T a^T: a panel would be filled in part only by so few columns, which are few rows there.
    if (few_columns && !few_rows) return mm(transposed(b), transposed(a), scale, compute, out_dtype).t();
    const Tensor out = at::empty({M, N}, a.values.options().dtype(out_dtype));
    if (by_rows) {
      const bool as_it_lies = b.values.stride(1) == 1 || b.values.stride(0) != 1;
      const MaskedMatrix rows = as_it_lies ? b : transposed(b);
      const Tensor x = with_contiguous_rows(a.values), values = with_contiguous_rows(rows.values);
      const Tensor mask = rows.mask.defined() ? rows.mask.contiguous() : rows.mask;
      const cpu::RowProducts product{.x = cpu_rows(x),
                                     .b = cpu_rows(values, mask),
                                     .b_as_it_lies = as_it_lies,
                                     .compute = type,
                                     .scale = static_cast<float>(scale),
                                     .addend = nullptr,
                                     .addend_stride = 0,
                                     .out = out.data_ptr(),
                                     .dtype = dtype_of(out_dtype),
                                     .M = M,
                                     .N = N,
                                     .K = K};
      parallel_for(0, N, ceil_div(kMinFlops, 2 * M * K + 1),
                   [&](int64_t begin, int64_t end) { cpu::row_products(product, begin, end); });
      return out;
    }
    const MaskedMatrix x = contiguous_if_masked(a), dense = contiguous_if_masked(b);
    multiply({{.R = a.values.size(1),
               .x = matrix(x.values, x.mask),
               .kind = cpu::Term::Kind::Dense,
               .dense = matrix(dense.values, dense.mask),
               .scale = static_cast<float>(scale)}},
             {}, {}, type, out);
    return out;
  }

 private:
  static DType compute_in(DType dtype) { return dtype == DType::BFloat16 ? dtype : DType::Float32; }

  static MaskedMatrix transposed(const MaskedMatrix& m) {
    return {m.values.t(), m.mask.defined() ? m.mask.t() : m.mask};
  }

  static Tensor with_contiguous_rows(const Tensor& m) { return m.stride(1) == 1 ? m : m.contiguous(); }

  static MaskedMatrix contiguous_if_masked(const MaskedMatrix& m) {
    return m.mask.defined() ? MaskedMatrix{m.values.contiguous(), m.mask.contiguous()} : m;
  }

  static cpu::Matrix matrix(const Tensor& values, const Tensor& mask = {}) {
    return {values.const_data_ptr(), dtype_of(values.scalar_type()), values.stride(0), values.stride(1),
            mask.defined() ? mask.const_data_ptr<bool>() : nullptr};
  }

  // out = the terms + added + bias, in chunks of rows: x of one chunk is arranged at a time.
  static void multiply(std::vector<cpu::Term> terms, LowRankList added, const Tensor& bias, DType compute,
                       const Tensor& out) {
    std::vector<cpu::Term> masked;
    std::vector<Tensor> masks;  // kept until the product is done
    for (const LowRank& one : added) {
      const bool* mask = nullptr;
      if (one.mask.defined()) mask = masks.emplace_back(one.mask.contiguous()).const_data_ptr<bool>();
      (mask == nullptr ? terms : masked)
          .push_back({.R = one.x.size(1),
                      .x = matrix(one.x),
                      .kind = cpu::Term::Kind::Dense,
                      .dense = matrix(one.factor),
                      .scale = static_cast<float>(one.scale),
                      .out_mask = mask});
    }
    terms.insert(terms.begin(), masked.begin(), masked.end());  // the first of them needs no sums of its own
    const Tensor bias_values = bias.defined() ? bias.contiguous() : bias;
    const int64_t M = out.size(0), J = out.size(1);
    if (M == 0 || J == 0) return;
    const cpu::Matmul product{.M = M,
                              .J = J,
                              .terms = terms.data(),
                              .num_terms = static_cast<int>(terms.size()),
                              .bias = bias.defined() ? bias_values.const_data_ptr() : nullptr,
                              .out = out.data_ptr(),
                              .dtype = dtype_of(out.scalar_type()),
                              .compute = compute};
    const int64_t chunks = ceil_div(M, cpu::most_matmul_rows(product));
    const int64_t boundary = cpu::row_boundary(product), chunk = ceil_div(ceil_div(M, chunks), boundary) * boundary;
    float* const x = workspace(cpu::arranged_floats(product, std::min(chunk, M)));
    for (int64_t row = 0; row < M; row += chunk) {
      multiply_rectangles(product, {row, std::min(row + chunk, M), x});
    }
  }

  // Memory for the arranged x (at most 16 MB, unless 120 rows are more), kept for the thread's next product: the system
  // would zero new memory each time.
  static float* workspace(int64_t floats) {
    thread_local Tensor kept;
    if (!kept.defined() || kept.numel() < floats) kept = at::empty({floats}, at::kFloat);
    return kept.data_ptr<float>();
  }

  // Cut into a rectangle for each thread, and that into what is computed at a time, which threads take in turn: cores
  // are not equally fast, nor equally free.
  static void multiply_rectangles(const cpu::Matmul& product, const cpu::MatmulRows& rows) {
    const int64_t boundary = cpu::row_boundary(product), M = rows.end - rows.begin, bands = ceil_div(M, boundary);
    constexpr int64_t kPanel = cpu::kMatmulColumnBoundary;
    const int64_t panels = ceil_div(product.J, kPanel);
    int64_t width = 0;  // of x
    for (int t = 0; t < product.num_terms; ++t) width += product.terms[t].R;
    // A panel is decoded for a few rows, too.
    const int64_t flops = 2 * std::max<int64_t>(M, 16) * product.J * width;
    const int64_t threads = flops < kMinFlops ? 1 : at::get_num_threads();
    int64_t row_parts = 1, column_parts = 1, least = std::numeric_limits<int64_t>::max();
    for (int64_t parts = 1; parts <= std::min(threads, bands); ++parts) {
      const int64_t others = std::min(threads / parts, panels);
      const int64_t work = ceil_div(bands, parts) * ceil_div(panels, others);  // of the thread that has most
      if (work < least) least = work, row_parts = parts, column_parts = others;
    }
    const int64_t bands_each = ceil_div(bands, row_parts), columns_each = ceil_div(panels, column_parts) * kPanel;
    const int64_t at_once = cpu::matmul_columns_at_once(product, std::min(bands_each * boundary, M));
    const int64_t rectangles = row_parts * column_parts, turns = ceil_div(columns_each, at_once);
    const int64_t columns = ceil_div(columns_each, turns * kPanel) * kPanel;
    const auto row_at = [&](int64_t band) { return std::min(rows.begin + band * boundary, rows.end); };
    // At least kGrain elements for a thread.
    const int64_t bands_worth = kGrain / (boundary * std::max<int64_t>(width, 1)) + 1;
    parallel_for(0, bands, std::max(ceil_div(bands, threads), bands_worth),
                 [&](int64_t begin, int64_t end) { cpu::arrange_rows(product, rows, row_at(begin), row_at(end)); });
    std::atomic<int64_t> next = 0;
    parallel_for(0, rectangles, 1, [&](int64_t, int64_t) {
      for (int64_t part; (part = next++) < rectangles * turns;) {
        const int64_t rectangle = part % rectangles, band = rectangle / column_parts * bands_each;
        const int64_t first = rectangle % column_parts * columns_each, column = first + part / rectangles * columns;
        const int64_t end = std::min({column + columns, first + columns_each, product.J});
        if (band < bands && column < end) {
          cpu::matmul(product, rows, {row_at(band), row_at(band + bands_each), column, end});
        }
      }
    });
  }
};

}  // namespace

const Device& cpu_device() {
  static const Cpu cpu;
  return cpu;
}

}  // namespace qlora
