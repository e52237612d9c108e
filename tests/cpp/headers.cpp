// SPDX-License-Identifier: Apache-2.0
// Tests of simd.h, gemm.h and transpose.h, compiled once per instruction set: exponential and logarithm, parts of
// vectors, rounding to bf16 and fp16, matrix products of every remainder, transposition; nothing read or written
// beside.
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <initializer_list>

#include <sys/mman.h>
#include <unistd.h>

#include "gemm.h"
#include "simd.h"
#include "transpose.h"

namespace pyd::PYD_ISA {

int test_headers();

namespace {

int failures = 0;

__attribute__((format(printf, 2, 3))) bool check(bool holds, const char* what, ...) {
  if (holds) return true;
  if (++failures > 20) return false;  // the first ones tell
  va_list given;
  va_start(given, what);
  std::vprintf(what, given);
  va_end(given);
  std::printf("\n");
  return false;
}

// Memory that ends where a page begins that may not be touched.
class Guarded {
 public:
  explicit Guarded(size_t bytes) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    size_ = (bytes + page - 1) / page * page + page;
    base_ = static_cast<char*>(mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    mprotect(base_ + size_ - page, page, PROT_NONE);
    end_ = base_ + size_ - page;
  }
  Guarded(const Guarded&) = delete;
  ~Guarded() { munmap(base_, size_); }
  // The last n elements before the guard.
  template <class T>
  T* last(int64_t n) const {
    return reinterpret_cast<T*>(end_) - n;
  }

 private:
  char *base_, *end_;
  size_t size_;
};

uint32_t state = 1;
uint32_t random_bits() {  // xorshift32
  state ^= state << 13;
  state ^= state >> 17;
  state ^= state << 5;
  return state;
}
// Uniform on (-1, 1).
float random_float() { return static_cast<float>(static_cast<int32_t>(random_bits())) * 0x1p-31f; }

const float infinity = __builtin_inff(), not_a_number = __builtin_nanf("");

bool is_nan(double x) { return x != x; }

float first_of(Floats v) {
  float all[Floats::width];
  v.store(all);
  return all[0];
}

// -------------------------------------------------------------------------------- exponential and logarithm

void test_exp2() {
  // Every exponent with fractions of all sizes; each lane takes its turn.
  double worst = 0;
  for (int e = -126; e < 128; ++e)
    for (int k = 0; k < 400; ++k) {
      float x[Floats::width], y[Floats::width];
      for (int l = 0; l < Floats::width; ++l) x[l] = static_cast<float>(e) + 0.5f + 0.5f * random_float();
      exp2(Floats::load(x)).store(y);
      for (int l = 0; l < Floats::width; ++l) {
        const double exact = __builtin_exp2(static_cast<double>(x[l]));
        // Below 2^-126 a result may be a subnormal or zero.
        if (exact < 0x1p-126 || x[l] < -126.4f) {
          check(y[l] >= 0 && y[l] <= 0x1.1p-126f, "exp2(%a) = %a", x[l], y[l]);
          continue;
        }
        if (y[l] == infinity && x[l] >= 127.5f) continue;  // the generic one and AVX2 give up a little early
        const double error = __builtin_fabs(y[l] - exact) / exact;
        worst = error > worst ? error : worst;
      }
    }
  check(worst < 2.2e-7, "exp2: relative error %.2e", worst);  // 1e-7 of the polynomial, and its roundings
  for (int e = -126; e < 128; ++e)
    check(first_of(exp2(Floats::all(static_cast<float>(e)))) == __builtin_ldexpf(1, e), "exp2(%d) is not exact", e);
  for (const float x : {128.0f, 128.5f, 1000.0f, 3e38f, infinity})
    check(first_of(exp2(Floats::all(x))) == infinity, "exp2(%g) is not infinite", x);
  for (const float x : {-150.0f, -1000.0f, -3e38f, -infinity})
    check(first_of(exp2(Floats::all(x))) == 0, "exp2(%g) is not 0", x);
  check(is_nan(first_of(exp2(Floats::all(not_a_number)))), "exp2(NaN) is a number");
  check(first_of(exp2(Floats::all(-0.0f))) == 1, "exp2(-0) is not 1");
}

void test_log() {
  double worst = 0;
  const auto try_one = [&](float x) {
    const double exact = __builtin_log(static_cast<double>(x)), found = first_of(log(Floats::all(x)));
    const double error = exact == 0 ? __builtin_fabs(found) : __builtin_fabs(found / exact - 1);
    if (error > worst) worst = error;
  };
  for (uint32_t bits = 0x00800000; bits < 0x7f800000; bits += 997) try_one(as_float(bits));
  // Around 1, where the logarithm itself is small: relative to the result all the same.
  for (int32_t k = -100000; k <= 100000; ++k) try_one(as_float(0x3f800000 + static_cast<uint32_t>(k)));
  for (int k = 1; k < 24; ++k) {
    try_one(1 + __builtin_ldexpf(1, -k));
    try_one(1 - __builtin_ldexpf(1, -k));
  }
  check(worst < 2.5e-7, "log: relative error %.2e", worst);
  check(first_of(log(Floats::all(1.0f))) == 0, "log(1) is not 0");
}

// -------------------------------------------------------------------------------- arithmetic

void test_arithmetic() {
  for (int round = 0; round < 2000; ++round) {
    float a[Floats::width], b[Floats::width], c[Floats::width], out[Floats::width];
    for (int l = 0; l < Floats::width; ++l) {
      a[l] = random_float();
      b[l] = random_float();
      c[l] = round % 3 == 0 ? -a[l] * b[l] : random_float();
    }
    if (round % 7 == 0) a[round % Floats::width] = not_a_number;
    if (round % 5 == 0) b[round % Floats::width] = a[round % Floats::width];
    const Floats x = Floats::load(a), y = Floats::load(b), z = Floats::load(c);
    const auto each = [&](const char* what, Floats v, auto expected) {
      v.store(out);
      for (int l = 0; l < Floats::width; ++l) {
        const float e = expected(l);
        check(out[l] == e || (is_nan(out[l]) && is_nan(e)), "%s: %a %a %a gave %a", what, a[l], b[l], c[l], out[l]);
      }
    };
    each("+", x + y, [&](int l) { return a[l] + b[l]; });
    each("-", x - y, [&](int l) { return a[l] - b[l]; });
    each("*", x * y, [&](int l) { return a[l] * b[l]; });
    each("/", x / y, [&](int l) { return a[l] / b[l]; });
    // a where x > 0, and never where x is NaN.
    each("where_positive", where_positive(x, y, z), [&](int l) { return a[l] > 0 ? b[l] : c[l]; });
    each("where_equal", where_equal(x, y, z, x), [&](int l) { return a[l] == b[l] ? c[l] : a[l]; });
    each("max", max(y, z), [&](int l) { return b[l] > c[l] ? b[l] : c[l]; });
    each("max", max(x, y), [&](int l) { return a[l] > b[l] ? a[l] : b[l]; });  // the second where one is NaN
    // One rounding or two, as the processor has it: both are within half a unit of the larger one.
    float sums[Floats::width], rests[Floats::width];
    fma(x, y, z).store(sums);
    fnma(x, y, z).store(rests);
    double total = 0;
    float top = -infinity;
    for (int l = 0; l < Floats::width; ++l) {
      const double product = static_cast<double>(a[l]) * b[l];
      if (!is_nan(product)) {
        check(__builtin_fabs(sums[l] - (product + c[l])) <= 0x1p-23, "fma(%a, %a, %a) = %a", a[l], b[l], c[l], sums[l]);
        check(__builtin_fabs(rests[l] - (c[l] - product)) <= 0x1p-23, "fnma(%a, %a, %a) = %a", a[l], b[l], c[l],
              rests[l]);
      }
      total += b[l];
      top = b[l] > top ? b[l] : top;
    }
    if (!is_nan(total)) {
      check(__builtin_fabs(sum(y) - total) < 2e-6, "sum %a, expected %a", sum(y), total);
      check(largest(y) == top, "largest %a, expected %a", largest(y), top);
    }
  }
}

// -------------------------------------------------------------------------------- storage types

// The nearest number with `digits` binary digits after the first and exponents from `lowest`, ties to even; infinite
// from 2^(highest + 1) on.
double nearest(double x, int digits, int lowest, int highest) {
  if (x == 0 || is_nan(x) || __builtin_isinf(x)) return x;
  int exponent;
  __builtin_frexp(x, &exponent);
  exponent = exponent - 1 < lowest ? lowest : exponent - 1;
  const double rounded = __builtin_ldexp(__builtin_rint(__builtin_ldexp(x, digits - exponent)), exponent - digits);
  return __builtin_fabs(rounded) >= __builtin_ldexp(1, highest + 1) ? __builtin_copysign(infinity, x) : rounded;
}

template <class S>
void test_rounding(const char* type, int digits, int lowest, int highest) {
  const auto try_some = [&](const float* x) {
    S stored[Floats::width];
    Floats::load(x).store(stored);
    for (int l = 0; l < Floats::width; ++l) {
      S alone;
      narrow(x[l], alone);
      const double exact = nearest(x[l], digits, lowest, highest);
      for (const S& s : {stored[l], alone}) {
        const double found = widen(s);
        // The instruction that rounds sixteen floats to bf16 takes subnormals for 0.
        const bool subnormal = digits == 7 && __builtin_fabs(x[l]) < 0x1p-126 && found == 0;
        check(found == exact || (is_nan(found) && is_nan(exact)) || subnormal, "%s: %a became %a, expected %a", type,
              x[l], found, exact);
        if (!is_nan(exact) && !is_nan(found))
          check(__builtin_signbit(found) == __builtin_signbit(static_cast<double>(x[l])), "%s: sign of %a", type, x[l]);
      }
    }
  };
  float x[Floats::width];
  // All exponents and signs, every 9,973rd number.
  for (uint64_t bits = 0; bits < uint64_t{1} << 32; bits += 9973 * Floats::width) {
    for (int l = 0; l < Floats::width; ++l)
      x[l] = as_float(static_cast<uint32_t>(bits + 9973u * static_cast<uint32_t>(l)));
    try_some(x);
  }
  // Ties, and the numbers on both sides of one: halfway between two neighbours, everywhere.
  const int shift = 23 - digits;
  for (uint32_t high = 0; high < uint32_t{1} << (32 - shift); high += 37) {
    const uint32_t half = 1u << (shift - 1), tie = (high << shift) + half;
    for (int l = 0; l < Floats::width; ++l)
      x[l] = as_float(tie + static_cast<uint32_t>(l % 3) - 1u + (static_cast<uint32_t>(l) << shift));
    try_some(x);
  }
  // What can be stored comes back as it was.
  for (uint32_t bits = 0; bits < 65536; bits += Floats::width) {
    S in[Floats::width], out[Floats::width];
    for (int l = 0; l < Floats::width; ++l) in[l].bits = static_cast<uint16_t>(bits + static_cast<uint32_t>(l));
    Floats::load(in).store(out);
    for (int l = 0; l < Floats::width; ++l) {
      const double wide = widen(in[l]);
      const bool subnormal = digits == 7 && __builtin_fabs(wide) < 0x1p-126 && (out[l].bits & 0x7fff) == 0;
      check(out[l].bits == in[l].bits || subnormal || (is_nan(wide) && is_nan(widen(out[l]))), "%s: %04x became %04x",
            type, in[l].bits, out[l].bits);
    }
  }
}

void test_widening() {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const int exponent = static_cast<int>(bits >> 10 & 31);
    const double mantissa = bits & 1023, sign = bits >> 15 ? -1 : 1;
    double exact = exponent == 0 ? __builtin_ldexp(mantissa, -24) : __builtin_ldexp(1024 + mantissa, exponent - 25);
    if (exponent == 31) exact = mantissa == 0 ? infinity : not_a_number;
    const double found = widen(f16{static_cast<uint16_t>(bits)});
    check(found == sign * exact || (is_nan(found) && is_nan(exact)), "fp16 %04x is %a, expected %a", bits, found,
          exact);
    float lanes[Floats::width];
    f16 halves[Floats::width];
    for (int l = 0; l < Floats::width; ++l) halves[l].bits = static_cast<uint16_t>(bits);
    Floats::load(halves).store(lanes);
    check(lanes[Floats::width - 1] == sign * exact || (is_nan(lanes[0]) && is_nan(exact)), "load of fp16 %04x", bits);
  }
}

template <class S>
void test_parts(const char* type) {
  constexpr int width = Floats::width;
  const Guarded memory(width * sizeof(S));
  for (int n = 0; n < width; ++n) {
    S* numbers = memory.last<S>(n);
    for (int i = 0; i < n; ++i) narrow(static_cast<float>(i + 1), numbers[i]);
    float out[width];
    Floats::load_part(numbers, n, -7.0f).store(out);
    for (int l = 0; l < width; ++l)
      check(out[l] == (l < n ? static_cast<float>(l + 1) : -7.0f), "%s: load_part of %d, lane %d is %g", type, n, l,
            out[l]);
    // Nothing is written past the end (the guard), and nothing between there and a whole vector (the numbers kept).
    for (int i = 0; i < n; ++i) narrow(0.0f, numbers[i]);
    Floats::load(out).store_part(numbers, n);
    for (int i = 0; i < n; ++i) check(widen(numbers[i]) == static_cast<float>(i + 1), "%s: store_part of %d", type, n);
    S kept[width];
    for (int i = 0; i < width; ++i) narrow(100.0f, kept[i]);
    Floats::load(out).store_part(kept, n);
    for (int i = 0; i < width; ++i)
      check(widen(kept[i]) == (i < n ? static_cast<float>(i + 1) : 100.0f), "%s: store_part of %d wrote %d", type, n,
            i);
  }
  S* whole = memory.last<S>(width);
  for (int i = 0; i < width; ++i) narrow(static_cast<float>(-i), whole[i]);
  S copy[width];
  Floats::load(whole).store(copy);
  for (int i = 0; i < width; ++i) check(widen(copy[i]) == static_cast<float>(-i), "%s: load or store", type);
}

// -------------------------------------------------------------------------------- matrix products

template <class T>
void fill(T* to, int64_t count, float x) {
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<T>(x);
}

// Small whole numbers: every sum is exact, in whatever order.
float whole_number() { return static_cast<float>(static_cast<int>(random_bits() % 9) - 4); }

template <class M, class SetA, class SetB>
void try_gemm(const char* what, int64_t rows, int64_t vectors, int64_t depth, bool turned, bool accumulate, SetA set_a,
              SetB set_b) {
  using V = typename M::Vector;
  using F = typename V::scalar;
  using Word = typename M::Word;
  const int64_t columns = vectors * V::width, b_row = columns + 3, c_row = columns + 5;
  const int64_t a_row = turned ? 1 : depth + 2, a_depth = turned ? rows + 1 : 1;
  const int64_t a_size = rows == 0 || depth == 0 ? 0 : (rows - 1) * a_row + (depth - 1) * a_depth + 1;
  const int64_t b_size = depth == 0 ? 0 : (depth - 1) * b_row + columns, c_size = rows * c_row;
  const Guarded a_memory(a_size * sizeof(Word)), b_memory(b_size * sizeof(Word));
  Word *a = a_memory.last<Word>(a_size), *b = b_memory.last<Word>(b_size);
  // What lies between the rows is no number, and must not be read into one.
  for (int64_t i = 0; i < a_size; ++i) set_a(a[i], not_a_number);
  for (int64_t i = 0; i < b_size; ++i) set_b(b[i], not_a_number);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t k = 0; k < depth; ++k) set_a(a[r * a_row + k * a_depth], whole_number());
  for (int64_t k = 0; k < depth; ++k)
    for (int64_t j = 0; j < columns; ++j) set_b(b[k * b_row + j], whole_number());
  F* c = new F[c_size + 1];
  fill(c, c_size + 1, 3.0f);
  gemm<M>(rows, columns, depth, a, a_row, a_depth, b, b_row, c, c_row, accumulate);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = 0; j < c_row; ++j) {
      double exact = 3;
      if (j < columns) {
        exact = accumulate ? 3 : 0;
        for (int64_t k = 0; k < depth; ++k) exact += set_a.times(a[r * a_row + k * a_depth], b[k * b_row + j]);
      }
      if (!check(c[r * c_row + j] == exact, "%s: %ld rows, %ld vectors, depth %ld, turned %d: (%ld, %ld) is %g, not %g",
                 what, long(rows), long(vectors), long(depth), turned, long(r), long(j), double(c[r * c_row + j]),
                 exact))
        break;
    }
  check(c[c_size] == 3, "%s wrote past the end", what);
  delete[] c;
}

template <class F>
struct Plain {
  void operator()(F& to, float x) const { to = x; }
  static double times(F a, F b) { return static_cast<double>(a) * b; }
};

#if defined(__AVX512BF16__)
struct InPairs {
  void operator()(MultiplyPairs::Word& to, float x) const {
    narrow(x, to.first);
    narrow(is_nan(x) ? x : 1.0f - x, to.second);
  }
  static double times(MultiplyPairs::Word a, MultiplyPairs::Word b) {
    return static_cast<double>(widen(a.first)) * widen(b.first) +
           static_cast<double>(widen(a.second)) * widen(b.second);
  }
};
#endif

template <class M, class Set>
void test_gemm(const char* what, Set set) {
  for (const int64_t rows : {0, 1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 29})
    for (int64_t vectors = 0; vectors <= 2 * gemm_vectors + 1; ++vectors)
      for (const int64_t depth : {0, 1, 2, 5, 33})
        for (const bool turned : {false, true})
          for (const bool accumulate : {false, true})
            try_gemm<M>(what, rows, vectors, depth, turned, accumulate, set, set);
}

// The bits of an element depend on its row and column alone, not on how many others are computed beside it.
void test_gemm_bits() {
  constexpr int64_t rows = 13, columns = 9 * Floats::width, depth = 50;
  static float a[rows * depth], b[depth * columns], c[rows * columns], part[rows * columns];
  for (float& x : a) x = random_float();
  for (float& x : b) x = random_float();
  gemm<Multiply<Floats>>(rows, columns, depth, a, depth, 1, b, columns, c, columns, false);
  for (int64_t first = 0; first < rows; ++first)
    for (int64_t left = 0; left < columns; left += Floats::width) {
      gemm<Multiply<Floats>>(rows - first, columns - left, depth, a + first * depth, depth, 1, b + left, columns, part,
                             columns, false);
      bool same = true;
      for (int64_t r = first; r < rows; ++r)
        for (int64_t j = left; j < columns; ++j) same &= c[r * columns + j] == part[(r - first) * columns + j - left];
      check(same, "gemm: other bits from row %ld, column %ld on", long(first), long(left));
    }
  // And a product gives the same bits whether it is added at once or kept apart and added later.
  for (float& x : part) x = random_float();
  static float sum[rows * columns];
  for (int64_t i = 0; i < rows * columns; ++i) sum[i] = part[i] + c[i];
  gemm<Multiply<Floats>>(rows, columns, depth, a, depth, 1, b, columns, part, columns, true);
  for (int64_t i = 0; i < rows * columns; ++i) check(sum[i] == part[i], "gemm: other bits where it is added at once");
}

// -------------------------------------------------------------------------------- transposition

template <class Word>
void test_transpose(const char* type) {
  for (int64_t rows = 0; rows <= 37; ++rows)
    for (int64_t columns = 0; columns <= 37; columns += rows % 3 + 1)
      for (const int64_t out_rows : {rows, rows + 1, (rows + 15) / 16 * 16, (rows + 63) / 64 * 64}) {
        const int64_t in_row = columns + 2, out_row = out_rows + 1;
        const int64_t in_size = rows == 0 ? 0 : (rows - 1) * in_row + columns;
        const Guarded memory(in_size * sizeof(Word)), target((columns * out_row + 1) * sizeof(Word));
        Word* in = memory.last<Word>(in_size);
        Word* out = target.last<Word>(columns * out_row);
        for (int64_t i = 0; i < in_size; ++i) in[i] = static_cast<Word>(i + 1);
        for (int64_t i = 0; i < columns * out_row; ++i) out[i] = static_cast<Word>(7777777);
        transpose(in, in_row, rows, columns, out, out_row, out_rows);
        bool right = true;
        for (int64_t c = 0; c < columns; ++c)
          for (int64_t r = 0; r < out_row; ++r) {
            const Word expected = r < rows       ? static_cast<Word>(r * in_row + c + 1)
                                  : r < out_rows ? Word{}
                                                 : static_cast<Word>(7777777);
            right &= out[c * out_row + r] == expected;
          }
        check(right, "transpose of %s: %ld x %ld to %ld", type, long(rows), long(columns), long(out_rows));
      }
}

void test_lanes() {
  for (int64_t columns = 1; columns <= Transpose::most_columns; ++columns) {
    constexpr int64_t width = Transpose::width;
    const Transpose turn(columns);
    const Guarded first(width * columns * sizeof(float)), second(width * columns * sizeof(float)),
        third(width * columns * sizeof(float));
    float *rows = first.last<float>(width * columns), *lanes = second.last<float>(width * columns),
          *back = third.last<float>(width * columns);
    for (int64_t i = 0; i < width * columns; ++i) rows[i] = static_cast<float>(i + 1);
    turn.load(rows, lanes);
    turn.store(lanes, back);
    for (int64_t l = 0; l < width; ++l)
      for (int64_t c = 0; c < columns; ++c) {
        check(lanes[c * width + l] == rows[l * columns + c], "Transpose::load of %ld columns", long(columns));
        check(back[l * columns + c] == rows[l * columns + c], "Transpose::store of %ld columns", long(columns));
      }
  }
}

}  // namespace

int test_headers() {
  test_exp2();
  test_log();
  test_arithmetic();
  test_rounding<bf16>("bf16", 7, -126, 127);
  test_rounding<f16>("fp16", 10, -14, 15);
  test_widening();
  test_parts<float>("fp32");
  test_parts<bf16>("bf16");
  test_parts<f16>("fp16");
  test_gemm<Multiply<Floats>>("gemm", Plain<float>{});
  test_gemm<Multiply<Doubles>>("gemm of doubles", Plain<double>{});
#if defined(__AVX512BF16__)
  test_gemm<MultiplyPairs>("gemm of pairs", InPairs{});
#endif
  test_gemm_bits();
  test_transpose<float>("floats");
  test_transpose<int32_t>("words");
  test_transpose<double>("doubles");
  test_lanes();
  return failures;
}

}  // namespace pyd::PYD_ISA
