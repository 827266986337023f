// The products of one instruction set.
#pragma once
#include "linear.h"

// Activations of one row as products want them, one after the other and each at a multiple of 64 bytes: the elements
// (int8, BF16 or FP32), then for each 32 columns their scale, for each 16 columns the sum of their integers times
// minus the weight's bias, and the sum of what the elements stand for.
struct hb_row_layout {
  int64_t units;  // of 32 columns
  int64_t scales, counts, sums, bytes;
};

struct hb_linear_kernels {
  // The arithmetic for a weight and activations of a type: the mode, or BF16 products.
  int (*arithmetic)(const hb_weight* w, int mode, int x_type);
  void (*layout)(const hb_weight* w, int arithmetic, hb_row_layout* layout);
  // One row of activations; scratch has room for k FP32 values, padded to 32.
  void (*prepare)(const hb_weight* w, int64_t lead, int arithmetic, const void* x, int type, void* row, float* scratch);
  // Panels first .. end - 1 of a product with `count` prepared rows; row i of the result starts at y + i * stride.
  void (*panels)(const hb_weight* w, int64_t lead, int arithmetic, int64_t first, int64_t end, const void* const* rows,
                 int64_t count, void* y, int y_type, int64_t y_stride);
  // Rows first .. end - 1 of a dense matrix; activations are FP32, or BF16 as the matrix where `dense_bf16` says so.
  int dense_bf16;
  void (*dense)(const hb_dense* w, const hb_product* p, int64_t first, int64_t end);
  // `width` activations of one row of gate and up.
  void (*activate)(const hb_mixture* m, const float* gate_up, int64_t width, float* out);
  // sum of weights[i] * rows[i] in this order; rows that are null are left out.
  void (*combine)(const float* const* rows, const float* weights, int64_t count, int64_t n, void* y, int y_type);
};

extern "C" {
extern const hb_linear_kernels hb_linear_baseline;
extern const hb_linear_kernels hb_linear_avx2;
extern const hb_linear_kernels hb_linear_avxvnni;
extern const hb_linear_kernels hb_linear_avx512;
extern const hb_linear_kernels hb_linear_avx512vnni;
extern const hb_linear_kernels hb_linear_avx512bf16;
extern const hb_linear_kernels hb_linear_dotprod;
}
