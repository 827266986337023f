// Factors of symmetric matrices in FP64: the same bits for every instruction set, and for any number of threads,
// unlike those of BLAS libraries.
#pragma once
#include <math.h>

#include "grids.h"

namespace {

struct Factor {
  static constexpr int P = 8;  // rows that are worked on together
  static constexpr int V = W / 2;
  const int64_t k;

  // rows[p][from..to) -= coefficient(b, p) * matrix[b][from..to) for all b in [first, last), one after the other
  template <class Coefficient>
  HB_MEMBER void subtract(double* rows, const double* matrix, int64_t first, int64_t last, int64_t from, int64_t to,
                          Coefficient coefficient) const {
    double c[P][P];
    for (int b = 0; b < last - first; ++b)
      for (int p = 0; p < P; ++p) c[b][p] = coefficient(first + b, p);
    for (int64_t i = from; i < to; i += V) {
      D sum[P];
      for (int p = 0; p < P; ++p) sum[p] = load<D>(rows + p * k + i);
      for (int b = 0; b < P; ++b) {
        const D v = load<D>(matrix + (first + b) * k + i);
        for (int p = 0; p < P; ++p) sum[p] -= v * c[b][p];
      }
      for (int p = 0; p < P; ++p) store(rows + p * k + i, sum[p]);
    }
  }

  // The upper triangle of a symmetric matrix becomes L^T of L L^T. False where a pivot is not positive.
  bool cholesky(double* m) const {
    for (int64_t start = 0; start < k; start += P) {
      double* const rows = m + start * k;
      for (int64_t b = 0; b < start; b += P)
        subtract(rows, m, b, b + P, start, k, [&](int64_t at, int p) { return m[at * k + start + p]; });
      for (int p = 0; p < P; ++p) {
        double* const row = rows + p * k;
        for (int q = 0; q < p; ++q) {
          const double* const earlier = rows + q * k;
          const double c = earlier[start + p];
          for (int64_t i = start; i < k; i += V)
            store(row + i, load<D>(row + i) - load<D>(earlier + i) * c);
        }
        const double pivot = row[start + p];
        if (!(pivot > 0.0 && pivot < __builtin_inf())) return false;
        const double root = sqrt(pivot);
        for (int64_t i = start + p; i < k; ++i) row[i] = row[i] / root;
      }
    }
    return true;
  }

  // Rows of L^T over their diagonals, the diagonals' squares, and zeros below.
  void normalise(double* m, double* gain) const {
    for (int64_t b = 0; b < k; ++b) {
      double* const row = m + b * k;
      const double pivot = row[b];
      gain[b] = pivot * pivot;
      for (int64_t i = 0; i < b; ++i) row[i] = 0.0;
      row[b] = 1.0;
      for (int64_t i = b + 1; i < k; ++i) row[i] = row[i] / pivot;
    }
  }

  // The inverse of the unit lower triangular matrix whose transpose is m.
  void invert(const double* m, double* out) const {
    for (int64_t start = 0; start < k; start += P) {
      double* const rows = out + start * k;
      for (int p = 0; p < P; ++p)
        for (int64_t i = 0; i < k; ++i) rows[p * k + i] = i == start + p ? 1.0 : 0.0;
      for (int64_t b = 0; b < start; b += P)
        subtract(rows, out, b, b + P, 0, b + P, [&](int64_t at, int p) { return m[at * k + start + p]; });
      for (int p = 0; p < P; ++p)
        for (int q = 0; q < p; ++q) {
          const double c = m[(start + q) * k + start + p];
          for (int64_t i = 0; i < start + P; i += V)
            store(rows + p * k + i, load<D>(rows + p * k + i) - load<D>(rows + q * k + i) * c);
        }
    }
  }
};

}  // namespace
