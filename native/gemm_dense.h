// Products with matrices of BF16, FP16 or FP32 as they are: lanes are columns, one running sum per row and lane.
#pragma once
#include "outputs.h"

namespace {

struct Fp32Elements {
  static constexpr int STEP = W;
  typedef F Value;
  static F load_x(const void* x, int64_t k) { return load<F>((const float*)x + k); }
  static F multiply(F w, F x, F sum) { return fma(w, x, sum); }
};

template <int TYPE>
struct Widened : Fp32Elements {
  static F load_w(const void* w, int64_t k) {
    if (TYPE == HB_FP32) return load<F>((const float*)w + k);
    return widen(load<Halves>((const uint16_t*)w + k));
  }
  static constexpr int size() { return TYPE == HB_FP32 ? 4 : 2; }
  static constexpr int x_size() { return 4; }
};

// BF16, of which a lane has two: the even element below, the odd one above.
struct Bf16Elements {
  static constexpr int STEP = 2 * W;
  struct Value {
    F even, odd;
  };
  static Value load_x(const void* x, int64_t k) {
    Value v;
    split_even_odd((const float*)x + k, v.even, v.odd);
    return v;
  }
  static Value load_w(const void* w, int64_t k) {
    const I both = load<I>((const uint16_t*)w + k);
    return {floats(both << 16), floats(both & (int32_t)0xffff0000)};
  }
  static F multiply(Value w, Value x, F sum) { return fma(w.odd, x.odd, fma(w.even, x.even, sum)); }
  static constexpr int size() { return 2; }
  static constexpr int x_size() { return 4; }
};

#if defined(__AVX512BF16__)
struct PairsOfBf16 {
  static constexpr int STEP = 2 * W;
  typedef I Value;
  static I load_x(const void* x, int64_t k) { return load<I>((const uint16_t*)x + k); }
  static I load_w(const void* w, int64_t k) { return load<I>((const uint16_t*)w + k); }
  static F multiply(I w, I x, F sum) { return Bf16::dot2(sum, w, x); }
  static constexpr int size() { return 2; }
  static constexpr int x_size() { return 2; }
};
#endif

template <class E, int T, int ROWS>
HB_INLINE void dense_tile(const hb_dense& w, const hb_product& p, int64_t n, int64_t t) {
  const char* rows[ROWS];
  const char* xs[T];
  for (int r = 0; r < ROWS; ++r) rows[r] = (const char*)w.values + (n + r) * w.stride * E::size();
  for (int i = 0; i < T; ++i) xs[i] = (const char*)p.x + (t + i) * p.x_stride * E::x_size();
  F sums[T][ROWS] = {};
  int64_t k = 0;
  for (; k + E::STEP <= w.k; k += E::STEP) {
    typename E::Value v[ROWS];
    HB_UNROLL for (int r = 0; r < ROWS; ++r) {
      if (T == 1) __builtin_prefetch(rows[r] + (k + ROWS * w.stride) * E::size(), 0, 2);  // the rows that come next
      v[r] = E::load_w(rows[r], k);
    }
    HB_UNROLL for (int i = 0; i < T; ++i) {
      const typename E::Value x = E::load_x(xs[i], k);
      HB_UNROLL for (int r = 0; r < ROWS; ++r) sums[i][r] = E::multiply(v[r], x, sums[i][r]);
    }
  }
  if (k < w.k) {
    alignas(64) char tail[E::STEP * 4], x_tail[E::STEP * 4];
    for (int r = 0; r < ROWS; ++r)
      for (int i = 0; i < T; ++i) {
        memset(tail, 0, sizeof tail);
        memset(x_tail, 0, sizeof x_tail);
        memcpy(tail, rows[r] + k * E::size(), (size_t)(w.k - k) * E::size());
        memcpy(x_tail, xs[i] + k * E::x_size(), (size_t)(w.k - k) * E::x_size());
        sums[i][r] = E::multiply(E::load_w(tail, 0), E::load_x(x_tail, 0), sums[i][r]);
      }
  }
  for (int i = 0; i < T; ++i)
    for (int r = 0; r < ROWS; ++r)
      put(p.y, p.y_type, (t + i) * p.y_stride + n + r, sum_of(sums[i][r]) + (w.row_bias ? w.row_bias[n + r] : 0.0f));
}

template <class E, int ROWS>
void dense_rows(const hb_dense& w, const hb_product& p, int64_t n) {
  int64_t t = 0;
  constexpr int AT_ONCE = W < 16 && ROWS == 4 ? 2 : ROWS;  // rows whose sums fit into 16 registers
  for (; t + 4 <= p.rows; t += 4)
    for (int r = 0; r < ROWS; r += AT_ONCE) dense_tile<E, 4, AT_ONCE>(w, p, n + r, t);
  if (p.rows - t >= 2) {
    dense_tile<E, 2, ROWS>(w, p, n, t);
    t += 2;
  }
  if (t < p.rows) dense_tile<E, 1, ROWS>(w, p, n, t);
}

template <class E>
void dense_of(const hb_dense& w, const hb_product& p, int64_t first, int64_t end) {
  int64_t n = first;
  for (; n + 4 <= end; n += 4) dense_rows<E, 4>(w, p, n);
  for (; n < end; ++n) dense_rows<E, 1>(w, p, n);
}

// x is FP32, or BF16 where BF16 products exist and both are BF16.
void dense(const hb_dense* w, const hb_product* p, int64_t first, int64_t end) {
#if defined(__AVX512BF16__)
  if (p->x_type == HB_BF16) return dense_of<PairsOfBf16>(*w, *p, first, end);
#endif
  if (w->type == HB_BF16) dense_of<Bf16Elements>(*w, *p, first, end);
  else if (w->type == HB_FP16) dense_of<Widened<HB_FP16>>(*w, *p, first, end);
  else dense_of<Widened<HB_FP32>>(*w, *p, first, end);
}

}  // namespace
