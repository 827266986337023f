// The kernels of one instruction set.
#pragma once
#include "halfbyte.h"

struct hb_kernels {
  int (*amax)(const void* x, int type, int64_t lead, int64_t count, float* out);
  int (*encode)(const hb_codec* codec, const hb_task* task);
  int (*decode)(const hb_codec* codec, const hb_task* task);
  int (*compare)(const hb_codec* codec, const hb_task* task);
  int (*gptq)(const hb_codec* codec, const hb_gptq_task* task);
  int (*round_rows)(const hb_codec* codec, const hb_rows_task* task);
  int (*descend)(const hb_codec* codec, const hb_descent_task* task);
  int (*subtract_products)(float* out, const float* left, const float* right, int64_t count, int64_t rows, int64_t k);
  int (*rotate)(float* x, int64_t lead, int64_t rows, int64_t k, int size, float norm, const uint8_t* swaps, int steps,
                int inverse);
  int (*factor)(int64_t count, int64_t k, double* m, double* inverse, double* gain);
};

extern "C" {
extern const hb_kernels hb_kernels_baseline;
extern const hb_kernels hb_kernels_avx2;
extern const hb_kernels hb_kernels_avx512;
}
