// Error statistics: sums in FP64, sixteen running sums by block number, so that they are the same for every width.
#pragma once
#include "halfbyte.h"
#include "vec.h"

namespace {

constexpr int LANES16 = 16;

struct Stats {
  double squared_error[LANES16] = {}, squares[LANES16] = {};
  F largest = {};
  int64_t saturated = 0;
  int64_t blocks[4] = {};
  hb_stats* out;

  explicit Stats(hb_stats* to) : out(to) {}
  void finish() {
    if (!out) return;
    double e = 0, s = 0, m = 0;
    for (int l = 0; l < LANES16; ++l) {
      e += squared_error[l];
      s += squares[l];
    }
    for (int l = 0; l < W; ++l) m = largest[l] > m ? (double)largest[l] : m;
    out->squared_error += e;
    out->squares += s;
    out->max_error = m > out->max_error ? m : out->max_error;
    out->saturated += saturated;
    for (int t = 0; t < 4; ++t) out->blocks[t] += blocks[t];
  }
};

// W of the running sums while one tile is worked on.
struct Sums {
  D error_low, error_high, squares_low, squares_high;
  F largest;
  I saturated;

  HB_INLINE Sums begin(const Stats& s, int first) {
    Sums r;
    r.error_low = load<D>(s.squared_error + first);
    r.error_high = load<D>(s.squared_error + first + W / 2);
    r.squares_low = load<D>(s.squares + first);
    r.squares_high = load<D>(s.squares + first + W / 2);
    r.largest = s.largest;
    r.saturated = I{};
    return r;
  }
  HB_MEMBER void error(F e) {
    const D low = low_half(e), high = high_half(e);
    error_low += low * low;
    error_high += high * high;
    largest = maximum(absolute(e), largest);
  }
  HB_MEMBER void square(F x) {
    const D low = low_half(x), high = high_half(x);
    squares_low += low * low;
    squares_high += high * high;
  }
  HB_MEMBER void range(I mask, F x, F low, F high) { saturated += ((I)(x < low) | (I)(x > high)) & mask; }
  HB_MEMBER void end(Stats& s, int first) const {
    store(s.squared_error + first, error_low);
    store(s.squared_error + first + W / 2, error_high);
    store(s.squares + first, squares_low);
    store(s.squares + first + W / 2, squares_high);
    s.largest = largest;
    for (int l = 0; l < W; ++l) s.saturated -= saturated[l];
  }
};

}  // namespace
