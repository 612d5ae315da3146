// The loops of row_products around the vectors of one instruction set: columns of b lie across the lanes and meet one
// place of x at a time. A file of kernels includes this inside its target region.
//
// Isa has
//   kLanes        of a Vector: fp32 numbers, or places of 32 bits
//   kPerStep      numbers of the reduction in a place: 1, or 2 in bf16
//   kRows         of x whose sums are in registers at the same time
//   load          kLanes numbers of any dtype, or the first `count` of them with zeros behind
//   store         kLanes numbers, rounded to the dtype
//   places        if kPerStep is 2: kLanes places of a row, or of its first `count` numbers with zeros behind
//   side_by_side  likewise: one place of each of kLanes columns, of two rows
//   transpose     kLanes vectors: lane j of vector i goes to lane i of vector j
//   Mask          of a place's numbers in each lane
//   mask          of a row's next kLanes places, or of its first `count` numbers with false behind
//   mask_in_turn  if kPerStep is 2, of side_by_side
//   keep          the numbers of a vector that a Mask has, and zeros
//   product       of places, onto fp32 sums
//   splat
namespace qlora::cpu {
namespace {

template <typename Isa>
constexpr std::int64_t kBlock = Isa::kLanes * Isa::kPerStep;  // of the reduction, that is multiplied at a time

template <typename Isa, typename T>
inline typename Isa::Vector load_first(const T* from, std::int64_t count) {
  return count == Isa::kLanes ? Isa::load(from) : Isa::load(from, count);
}

template <typename Isa, typename T>
inline typename Isa::Vector first_places(const T* from, std::int64_t count) {
  if constexpr (Isa::kPerStep == 1) {
    return load_first<Isa>(from, count);
  } else {
    return count == kBlock<Isa> ? Isa::places(from) : Isa::places(from, count);
  }
}

// The places of `length` numbers of x from k on, a block of all rows after the other.
template <typename Isa>
void arrange(const RowProducts& p, std::int64_t k, std::int64_t length, float* to) {
  with_type(p.x.dtype, [&](auto type) {
    const auto* x = static_cast<const decltype(type)*>(p.x.values) + k;
    for (std::int64_t at = 0; at < length; at += kBlock<Isa>) {
      const std::int64_t count = smaller(length - at, kBlock<Isa>);
      for (std::int64_t m = 0; m < p.M; ++m, to += Isa::kLanes) {
        Isa::store(to, first_places<Isa>(x + m * p.x.stride + at, count));
      }
    }
  });
}

// A block of so many columns, a place in each vector; of b's rows, or of its columns side by side. What is beyond the
// columns may be anything, beyond the block's `count` numbers it is 0. mask: of the first number, or null.
template <typename Isa, typename T>
inline void load_columns(const T* from, std::int64_t stride, const bool* mask, std::int64_t mask_stride,
                         std::int64_t columns, std::int64_t count, typename Isa::Vector (&places)[Isa::kLanes]) {
#pragma GCC unroll 16
  for (std::int64_t i = 0; i < Isa::kLanes; ++i) {
    const std::int64_t column = i < columns ? i : columns - 1;
    places[i] = first_places<Isa>(from + column * stride, count);
    if (mask != nullptr) {
      const bool* of_column = mask + column * mask_stride;
      places[i] = Isa::keep(places[i], count == kBlock<Isa> ? Isa::mask(of_column) : Isa::mask(of_column, count));
    }
  }
  Isa::transpose(places);
}

template <typename Isa, typename T>
inline void load_side_by_side(const T* from, std::int64_t stride, const bool* mask, std::int64_t mask_stride,
                              std::int64_t columns, std::int64_t count, typename Isa::Vector (&places)[Isa::kLanes]) {
  const auto load = [&](auto&& row) __attribute__((always_inline)) {
#pragma GCC unroll 16
    for (std::int64_t i = 0; i < Isa::kLanes; ++i) {
      if constexpr (Isa::kPerStep == 1) {
        places[i] = Isa::load(row(i));
      } else {
        places[i] = Isa::side_by_side(row(2 * i), row(2 * i + 1));
      }
    }
  };
  if (columns == Isa::kLanes && count == kBlock<Isa>) {
    load([&](std::int64_t k) { return from + k * stride; });
    if (mask == nullptr) return;
#pragma GCC unroll 16
    for (std::int64_t i = 0; i < Isa::kLanes; ++i, mask += Isa::kPerStep * mask_stride) {
      if constexpr (Isa::kPerStep == 1) {
        places[i] = Isa::keep(places[i], Isa::mask(mask));
      } else {
        places[i] = Isa::keep(places[i], Isa::mask_in_turn(mask, mask + mask_stride));
      }
    }
    return;
  }
  T copies[kBlock<Isa>][Isa::kLanes];  // of rows that are not whole, or masked
  const T zeros[Isa::kLanes] = {};
  const bool as_they_are = columns == Isa::kLanes && mask == nullptr;
  for (std::int64_t k = 0; k < count && !as_they_are; ++k) {
    __builtin_memset(copies[k], 0, sizeof copies[k]);
    __builtin_memcpy(copies[k], from + k * stride, static_cast<std::size_t>(columns) * sizeof(T));
    for (std::int64_t j = 0; j < columns && mask != nullptr; ++j) {
      if (!mask[k * mask_stride + j]) copies[k][j] = T{};
    }
  }
  load([&](std::int64_t k) { return k >= count ? zeros : as_they_are ? from + k * stride : copies[k]; });
}

// A block's products with rows of x, onto their sums. Few rows have several chains of additions each, to keep the units
// busy.
template <typename Isa, int kRows = Isa::kRows>
inline void add_products(const float* x, std::int64_t rows, const typename Isa::Vector (&columns)[Isa::kLanes],
                         float* sums) {
  constexpr int kChains = kRows < 4 ? 4 / kRows : 1;
  for (; rows >= kRows; rows -= kRows, x += kRows * Isa::kLanes, sums += kRows * Isa::kLanes) {
    typename Isa::Vector chains[kChains][kRows];
#pragma GCC unroll 8
    for (int i = 0; i < kChains * kRows; ++i) chains[i / kRows][i % kRows] = Isa::splat(0.0f);
#pragma GCC unroll 16
    for (int i = 0; i < Isa::kLanes; ++i) {
#pragma GCC unroll 8
      for (int m = 0; m < kRows; ++m) {
        auto& sum = chains[i % kChains][m];
        sum = Isa::product(Isa::splat(x[m * Isa::kLanes + i]), columns[i], sum);
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
      auto sum = chains[0][m];
#pragma GCC unroll 4
      for (int i = 1; i < kChains; ++i) sum += chains[i][m];
      float* to = sums + m * Isa::kLanes;
      Isa::store(to, Isa::load(to) + sum);
    }
  }
  if constexpr (kRows > 1) {
    if (rows > 0) add_products<Isa, kRows - 1>(x, rows, columns, sums);
  }
}

template <typename Isa, typename T>
inline void finish_row(const RowProducts& p, std::int64_t first, std::int64_t columns, std::int64_t m,
                       const float* sum) {
  typename Isa::Vector values = Isa::load(sum) * Isa::splat(p.scale);
  if (p.addend != nullptr) {
    values += load_first<Isa>(p.addend + m * p.addend_stride + first, columns);
  }
  T* out = static_cast<T*>(p.out) + m * p.N + first;
  if (columns == Isa::kLanes) {
    Isa::store(out, values);
  } else {
    T rounded[Isa::kLanes];
    Isa::store(rounded, values);
    __builtin_memcpy(out, rounded, static_cast<std::size_t>(columns) * sizeof(T));
  }
}

// A block of b, from k on, times the same of x, onto the sums of kLanes columns from `first` on, or fewer.
template <typename Isa, typename T>
inline void add_block(const RowProducts& p, std::int64_t first, std::int64_t columns, std::int64_t k,
                      std::int64_t count, const float* x, float* sums) {
  const std::int64_t row = p.b_as_it_lies ? k : first, column = p.b_as_it_lies ? first : k;
  const T* b = static_cast<const T*>(p.b.values) + row * p.b.stride + column;
  const bool* mask = p.b.mask == nullptr ? nullptr : p.b.mask + row * p.b.mask_stride + column;
  typename Isa::Vector places[Isa::kLanes];
  if (p.b_as_it_lies) {
    load_side_by_side<Isa>(b, p.b.stride, mask, p.b.mask_stride, columns, count, places);
  } else {
    load_columns<Isa>(b, p.b.stride, mask, p.b.mask_stride, columns, count, places);
  }
  add_products<Isa>(x, p.M, places, sums);
}

// In rectangles of b that fit the caches: columns that lie side by side share lines, and x is packed where it is read.
// Sums are those of the first segment of K; a later one has its own, which are added at its end. In one chain over a
// long K, each product would be rounded to the size of the sum so far.
template <typename Isa, typename T>
void multiply(const RowProducts& p, std::int64_t begin, std::int64_t end) {
  constexpr std::int64_t kSegment = 256, kWidth = 512;
  alignas(64) float x[kMostRowProducts * kSegment / Isa::kPerStep];
  alignas(64) float sums[kMostRowProducts * kWidth], later[kMostRowProducts * kWidth];
  for (std::int64_t left = begin; left < end; left += kWidth) {
    const std::int64_t right = smaller(left + kWidth, end);
    const auto each_columns = [&](float* of_columns, auto&& handle) {
      for (std::int64_t first = left; first < right; first += Isa::kLanes, of_columns += p.M * Isa::kLanes) {
        handle(first, smaller(right - first, Isa::kLanes), of_columns);
      }
    };
    const std::int64_t num_sums = ceil_div(right - left, Isa::kLanes) * Isa::kLanes * p.M;
    const auto clear = [&](float* to) { __builtin_memset(to, 0, static_cast<std::size_t>(num_sums) * sizeof(float)); };
    clear(sums);
    for (std::int64_t k = 0; k < p.K; k += kSegment) {
      float* const to = k == 0 ? sums : later;
      if (k > 0) clear(later);
      const std::int64_t length = smaller(p.K - k, kSegment);
      arrange<Isa>(p, k, length, x);
      const auto each_block = [&](auto&& handle) {
        for (std::int64_t at = 0; at < length; at += kBlock<Isa>) {
          handle(k + at, smaller(length - at, kBlock<Isa>), x + at / Isa::kPerStep * p.M);
        }
      };
      // In the order in which b lies.
      if (p.b_as_it_lies) {
        each_block([&](std::int64_t from, std::int64_t count, const float* of_x) {
          each_columns(to, [&](std::int64_t first, std::int64_t columns, float* of_columns) {
            add_block<Isa, T>(p, first, columns, from, count, of_x, of_columns);
          });
        });
      } else {
        each_columns(to, [&](std::int64_t first, std::int64_t columns, float* of_columns) {
          each_block([&](std::int64_t from, std::int64_t count, const float* of_x) {
            add_block<Isa, T>(p, first, columns, from, count, of_x, of_columns);
          });
        });
      }
      for (std::int64_t i = 0; i < num_sums && k > 0; ++i) sums[i] += later[i];
    }
    with_type(p.dtype, [&](auto type) {
      each_columns(sums, [&](std::int64_t first, std::int64_t columns, const float* from) {
        for (std::int64_t m = 0; m < p.M; ++m) {
          finish_row<Isa, decltype(type)>(p, first, columns, m, from + m * Isa::kLanes);
        }
      });
    });
  }
}

template <typename Isa>
void multiply_any(const RowProducts& p, std::int64_t begin, std::int64_t end) {
  with_type(p.b.dtype, [&](auto type) { multiply<Isa, decltype(type)>(p, begin, end); });
}

}  // namespace
}  // namespace qlora::cpu
