// Element tables: the nearest value and its code, exactly as the reference finds them.
#pragma once
#include "halfbyte.h"
#include "vec.h"

#define HB_MEMBER inline __attribute__((always_inline))

namespace {

// Each grid offers
//   miss(z):  z minus its nearest value (for symmetric grids of |z|: only the magnitude of the result counts)
//   code(z, value): the code of z, and the value that the code stands for
// A symmetric grid is searched with magnitudes.

// Magnitude |z| in steps of a float with `BITS` mantissa bits above 2**LOW, at most `most`, rounded half to even:
// adding M puts the last bit of the grid at the end of the mantissa.
template <int BITS, int LOW>
struct FloatSteps {
  F sum, shift;
  I field;

  HB_INLINE FloatSteps make(F a, float most) {
    FloatSteps s;
    constexpr float smallest = 1.0f / (1 << -LOW);
    a = minimum(a, all(most));
    s.field = bits(maximum(a, all(smallest))) & 0x7f800000;
    s.shift = floats(s.field + ((23 - BITS) << 23));
    s.sum = a + s.shift;
    return s;
  }
  HB_INLINE F value(const FloatSteps& s) { return s.sum - s.shift; }
  HB_INLINE I code(const FloatSteps& s) {
    const int32_t first = (127 + LOW) << BITS;
    return bits(s.sum) - bits(s.shift) + (s.field >> (23 - BITS)) - first;
  }
};

typedef FloatSteps<1, 0> E2M1Steps;
typedef FloatSteps<3, -6> E4M3Steps;

struct GridE2M1 {
  static constexpr bool symmetric = true;
  explicit GridE2M1(const hb_table&) {}
  HB_MEMBER F miss(F a) const { return a - E2M1Steps::value(E2M1Steps::make(a, 6.0f)); }
  HB_MEMBER I code(F z, F& value) const {
    const E2M1Steps s = E2M1Steps::make(absolute(z), 6.0f);
    value = floats(bits(E2M1Steps::value(s)) | sign_of(z));
    return E2M1Steps::code(s) | (I)(((U)bits(z) >> 28) & 8u);
  }
};

struct GridE4M3 {
  static constexpr bool symmetric = true;
  explicit GridE4M3(const hb_table&) {}
  HB_MEMBER F miss(F a) const { return a - E4M3Steps::value(E4M3Steps::make(a, 448.0f)); }
  HB_MEMBER I code(F z, F& value) const {
    const E4M3Steps s = E4M3Steps::make(absolute(z), 448.0f);
    value = floats(bits(E4M3Steps::value(s)) | sign_of(z));
    return E4M3Steps::code(s) | (I)(((U)bits(z) >> 24) & 128u);
  }
};

// Integers -7..7 as sign and magnitude or in two's complement.
template <bool TWOS_COMPLEMENT>
struct GridInt7 {
  static constexpr bool symmetric = true;
  explicit GridInt7(const hb_table&) {}
  HB_MEMBER F miss(F a) const {
    const F magic = all(8388608.0f);
    return a - ((minimum(a, all(7.0f)) + magic) - magic);
  }
  HB_MEMBER I code(F z, F& value) const {
    const F magic = all(8388608.0f);
    const F sum = minimum(absolute(z), all(7.0f)) + magic;
    const I magnitude = bits(sum) & 15, sign = sign_of(z);
    value = floats(bits(sum - magic) | sign);
    if (!TWOS_COMPLEMENT) return magnitude | (I)(((U)sign >> 28) & 8u);
    const I minus = sign >> 31;
    return ((magnitude ^ minus) - minus) & 15;
  }
};

// IF4's integers: the factors are those of its reference implementation.
struct GridIf4 {
  static constexpr bool symmetric = true;
  GridInt7<true> integers;
  explicit GridIf4(const hb_table& t) : integers(t) {}
  HB_MEMBER F miss(F a) const {
    const F magic = all(8388608.0f);
    const F q = (minimum(a * all(1.16666666f), all(7.0f)) + magic) - magic;
    return a - q * all(0.8571428571f);
  }
  HB_MEMBER I code(F z, F& value) const {
    F q;
    const I c = integers.code(z * all(1.16666666f), q);
    value = q * all(0.8571428571f);
    return c;
  }
};

struct GridOffset {
  static constexpr bool symmetric = false;
  explicit GridOffset(const hb_table&) {}
  HB_MEMBER F miss(F z) const { return z - rint_small(clip(z, -8.0f, 7.0f)); }
  HB_MEMBER I code(F z, F& value) const {
    value = rint_small(clip(z, -8.0f, 7.0f));
    return to_int(value) + 8;
  }
};

// E2M1 whose code 8 is a value of its own.
struct GridSpecial {
  static constexpr bool symmetric = false;
  GridE2M1 plain;
  float special;
  explicit GridSpecial(const hb_table& t) : plain(t), special(t.values[8]) {}
  HB_MEMBER F miss(F z) const {
    const F a = absolute(plain.miss(absolute(z)));
    return minimum(absolute(z - all(special)), a);
  }
  HB_MEMBER I code(F z, F& value) const {
    F v;
    I c = plain.code(z, v);
    c = select(c == 8, I{}, c);
    const I nearer = absolute(z - all(special)) < absolute(z - v);
    value = select(nearer, all(special), v);
    return select(nearer, all(8), c);
  }
};

// Any 16 values: their thresholds are counted.
struct GridLadder {
  static constexpr bool symmetric = false;
  const hb_table& t;
  explicit GridLadder(const hb_table& table) : t(table) {}
  HB_MEMBER I steps(F z) const {
#if HB_LANES == 16
    // binary search with permutes of the threshold table
    const float* const table = t.thresholds;
    I k = (I)(z >= all(table[7])) & 8;
    k += (z >= lookup16(table, k + 3)) & 4;
    k += (z >= lookup16(table, k + 1)) & 2;
    return k + ((z >= lookup16(table, k)) & 1);
#else
    I k = {};
    for (int i = 0; i < 15; ++i) k -= z >= all(t.thresholds[i]);
    return k;
#endif
  }
  HB_MEMBER F miss(F z) const { return z - lookup16(t.ladder_values, steps(z)); }
  HB_MEMBER I code(F z, F& value) const {
    const I k = steps(z);
    value = lookup16(t.ladder_values, k);
    return lookup16(t.ladder_codes, k);
  }
};

template <class Use>
HB_INLINE void with_grid(const hb_table& t, Use use) {
  switch (t.kind) {
    case HB_E2M1:
      return use(GridE2M1(t));
    case HB_INT_SIGN_MAGNITUDE:
      return use(GridInt7<false>(t));
    case HB_INT_TWOS_COMPLEMENT:
      return use(GridInt7<true>(t));
    case HB_IF4_INT:
      return use(GridIf4(t));
    case HB_INT_OFFSET:
      return use(GridOffset(t));
    case HB_E4M3:
      return use(GridE4M3(t));
    case HB_E2M1_SPECIAL:
      return use(GridSpecial(t));
    default:
      return use(GridLadder(t));
  }
}

}  // namespace
