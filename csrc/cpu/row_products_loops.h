// The loops of row_products around the vectors of one instruction set: rows of b lie across the lanes and meet one
// number of x at a time. A file of kernels includes this inside its target region.
//
// Isa has
//   kLanes     of a Vector, which holds fp32 numbers
//   load       kLanes numbers of any dtype, or the first `count` of them with zeros behind
//   transpose  kLanes vectors: the lanes of each become one of each
//   store      kLanes numbers, rounded to the dtype
//   splat, add, multiply, multiply_add
namespace qlora::cpu {
namespace {

template <typename Isa, typename T>
inline typename Isa::Vector load_first(const T* from, std::int64_t count) {
  return count == Isa::kLanes ? Isa::load(from) : Isa::load(from, count);
}

// The first `count` numbers of `rows` rows, one a lane; lanes beyond them repeat the last row.
template <typename Isa, typename T>
inline void load_columns(const T* from, std::int64_t stride, std::int64_t rows, std::int64_t count,
                         typename Isa::Vector (&columns)[Isa::kLanes]) {
#pragma GCC unroll 16
  for (std::int64_t i = 0; i < Isa::kLanes; ++i) {
    const T* row = from + (i < rows ? i : rows - 1) * stride;
    columns[i] = load_first<Isa>(row, count);
  }
  Isa::transpose(columns);
}

// Their products with `count` numbers of x, onto `sum`: in four chains, to keep the units busy.
template <typename Isa, typename T>
inline void add_products(const T* x, std::int64_t count, const typename Isa::Vector (&columns)[Isa::kLanes],
                         float* sum) {
  constexpr int kChains = 4;
  alignas(64) float values[Isa::kLanes];
  Isa::store(values, load_first<Isa>(x, count));
  typename Isa::Vector sums[kChains];
#pragma GCC unroll 4
  for (int i = 0; i < kChains; ++i) sums[i] = Isa::multiply(Isa::splat(values[i]), columns[i]);
#pragma GCC unroll 16
  for (int i = kChains; i < Isa::kLanes; ++i) {
    sums[i % kChains] = Isa::multiply_add(Isa::splat(values[i]), columns[i], sums[i % kChains]);
  }
  Isa::store(sum, Isa::add(Isa::load(sum), Isa::add(Isa::add(sums[0], sums[1]), Isa::add(sums[2], sums[3]))));
}

template <typename Isa, typename T>
inline void finish_row(const RowProducts& p, std::int64_t first, std::int64_t rows, std::int64_t m, const float* sum) {
  typename Isa::Vector values = Isa::multiply(Isa::load(sum), Isa::splat(p.scale));
  if (p.addend != nullptr) {
    values = Isa::add(values, load_first<Isa>(p.addend + m * p.addend_stride + first, rows));
  }
  T* out = static_cast<T*>(p.out) + m * p.N + first;
  if (rows == Isa::kLanes) {
    Isa::store(out, values);
  } else {
    T rounded[Isa::kLanes];
    Isa::store(rounded, values);
    __builtin_memcpy(out, rounded, static_cast<std::size_t>(rows) * sizeof(T));
  }
}

template <typename Isa, typename X, typename B>
void multiply(const RowProducts& p, std::int64_t begin, std::int64_t end) {
  for (std::int64_t first = begin; first < end; first += Isa::kLanes) {
    const std::int64_t rows = end - first < Isa::kLanes ? end - first : Isa::kLanes;
    alignas(64) float sums[kMostRowProducts][Isa::kLanes];
    __builtin_memset(sums, 0, static_cast<std::size_t>(p.M) * sizeof sums[0]);
    for (std::int64_t k = 0; k < p.K; k += Isa::kLanes) {
      const std::int64_t count = p.K - k < Isa::kLanes ? p.K - k : Isa::kLanes;
      typename Isa::Vector columns[Isa::kLanes];
      load_columns<Isa>(static_cast<const B*>(p.b.values) + first * p.b.stride + k, p.b.stride, rows, count, columns);
      for (std::int64_t m = 0; m < p.M; ++m) {
        add_products<Isa>(static_cast<const X*>(p.x.values) + m * p.x.stride + k, count, columns, sums[m]);
      }
    }
    with_type(p.dtype, [&](auto type) {
      for (std::int64_t m = 0; m < p.M; ++m) finish_row<Isa, decltype(type)>(p, first, rows, m, sums[m]);
    });
  }
}

template <typename Isa>
void multiply_any(const RowProducts& p, std::int64_t begin, std::int64_t end) {
  with_type(p.x.dtype, [&](auto x) {
    with_type(p.b.dtype, [&](auto b) { multiply<Isa, decltype(x), decltype(b)>(p, begin, end); });
  });
}

}  // namespace
}  // namespace qlora::cpu
