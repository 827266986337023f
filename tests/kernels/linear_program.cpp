// Reads products from the standard input and writes their results: what runs where there is no Python.
// A case: hb_weight; sizes and bytes of codes, scales, offsets, global scale, swaps; rows, type, mode and the
// activations. All numbers are int64.
#include <stdio.h>
#include <stdlib.h>

#include "linear_kernels.h"

extern "C" const hb_linear_kernels HB_NAME;

static int64_t number() {
  int64_t v;
  if (fread(&v, 8, 1, stdin) != 1) exit(2);
  return v;
}

static void* bytes() {
  const int64_t size = number();
  if (!size) return nullptr;
  void* const p = aligned_alloc(64, (size_t)(size + 63) / 64 * 64);
  if (fread(p, (size_t)size, 1, stdin) != 1) exit(2);
  return p;
}

int main() {
  hb_weight w;
  const hb_linear_kernels& kernels = HB_NAME;
  while (fread(&w, sizeof w, 1, stdin) == 1) {
    w.codes = bytes();
    w.scales = bytes();
    w.offsets = bytes();
    w.global_scale = (const float*)bytes();
    w.swaps = (const uint8_t*)bytes();
    w.row_bias = nullptr;
    const int64_t rows = number(), type = number(), mode = number();
    const char* const x = (const char*)bytes();
    const int arithmetic = kernels.arithmetic(&w, (int)mode, (int)type);
    hb_row_layout layout;
    kernels.layout(&w, arithmetic, &layout);
    char* const prepared = (char*)aligned_alloc(64, (size_t)(rows * layout.bytes));
    float* const scratch = (float*)aligned_alloc(64, (size_t)layout.units * 128);
    float* const y = (float*)malloc((size_t)(rows * w.n) * 4);
    const void** const all = (const void**)malloc((size_t)rows * sizeof(void*));
    for (int64_t t = 0; t < rows; ++t) {
      all[t] = prepared + t * layout.bytes;
      kernels.prepare(&w, 0, arithmetic, x + t * w.k * (type == HB_FP32 ? 4 : 2), (int)type, (void*)all[t], scratch);
    }
    kernels.panels(&w, 0, arithmetic, 0, (w.n + 15) / 16, all, rows, y, HB_FP32, w.n);
    fwrite(y, 4, (size_t)(rows * w.n), stdout);
  }
  return 0;
}
