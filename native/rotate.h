// Rotations of blocks of columns: sums and differences at distances 1, 2, 4 ..., then one product, as
// formats/rotation.py defines them.
#pragma once
#include "halfbyte.h"
#include "grids.h"

namespace {

// The lanes whose numbers differ in one bit, exchanged.
template <int DISTANCE>
HB_INLINE F exchanged(F v) {
#if HB_LANES == 16
  if (DISTANCE == 8) return HB_SHUFFLE(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
  if (DISTANCE == 4) return HB_SHUFFLE(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
  if (DISTANCE == 2) return HB_SHUFFLE(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
  return HB_SHUFFLE(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
#elif HB_LANES == 8
  if (DISTANCE == 4) return HB_SHUFFLE(v, v, 4, 5, 6, 7, 0, 1, 2, 3);
  if (DISTANCE == 2) return HB_SHUFFLE(v, v, 2, 3, 0, 1, 6, 7, 4, 5);
  return HB_SHUFFLE(v, v, 1, 0, 3, 2, 5, 4, 7, 6);
#else
  if (DISTANCE == 2) return HB_SHUFFLE(v, v, 2, 3, 0, 1);
  return HB_SHUFFLE(v, v, 1, 0, 3, 2);
#endif
}

template <int N>
struct Rotate {
  static constexpr int V = N / W;

  template <int DISTANCE>
  HB_MEMBER static void within(F* v) {
    const I second = (lane_numbers() & DISTANCE) != 0;
    for (int i = 0; i < V; ++i) {
      const F other = exchanged<DISTANCE>(v[i]);
      v[i] = select(second, other - v[i], v[i] + other);
    }
  }

  HB_MEMBER static void hadamard(float* x, float norm) {
    F v[V];
    for (int i = 0; i < V; ++i) v[i] = load<F>(x + i * W);
    within<1>(v);
    within<2>(v);
    if (W > 4) within<4>(v);
    if (W > 8) within<8>(v);
    for (int distance = 1; distance < V; distance *= 2)
      for (int i = 0; i < V; i += 2 * distance)
        for (int j = i; j < i + distance; ++j) {
          const F a = v[j], b = v[j + distance];
          v[j] = a + b;
          v[j + distance] = a - b;
        }
    for (int i = 0; i < V; ++i) store(x + i * W, v[i] * norm);
  }

  static void swap(float* x, int channel) {
    const float first = x[0];
    x[0] = x[channel];
    x[channel] = first;
  }

  static void matrix(float* x, int64_t rows, int64_t blocks, float norm, const uint8_t* swaps, int steps,
                     int inverse) {
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t block = 0; block < blocks; ++block, x += N) {
        if (!swaps) {
          hadamard(x, norm);
          continue;
        }
        const uint8_t* const own = swaps + block * steps;
        for (int i = 0; i < steps; ++i) {
          const int channel = own[inverse ? steps - 1 - i : i];
          if (channel >= N) continue;
          if (inverse) hadamard(x, norm);
          swap(x, channel);
          if (!inverse) hadamard(x, norm);
        }
      }
  }

  static void all_matrices(float* x, int64_t lead, int64_t rows, int64_t k, float norm, const uint8_t* swaps,
                           int steps, int inverse) {
    const int64_t blocks = k / N;
    for (int64_t i = 0; i < lead; ++i)
      matrix(x + i * rows * k, rows, blocks, norm, swaps ? swaps + i * blocks * steps : nullptr, steps, inverse);
  }
};

}  // namespace
