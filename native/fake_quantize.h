// Fake quantization for training: plain buffers, like halfbyte.h, in a library of functions of its own.
#pragma once
#include "halfbyte.h"

extern "C" {

// Masters to the nearest codes of scales that are given. Blocks are `columns` of a row, a multiple of 16.
typedef struct {
  const float* x;  // [lead, n, k]
  int64_t lead, n, k, columns;
  const float* thresholds;      // [tables, 16]: z gets the level #(t <= z); the last one is +inf
  const uint8_t* level_codes;   // [tables, 16]
  const float* values;          // [tables, 16], by code
  const float* inverse_global;  // [lead] or null
  const float* inverse;         // [lead, n, k / columns]: z = x * inverse_global * inverse
  const float* scale;           // [lead, n, k / columns]: what values are multiplied by
  const float* lowest;          // [tables]: the values' ends
  const float* highest;
  const uint8_t* chosen;  // [lead, n, k / columns] or null: the table of each block
  uint8_t* codes;         // [lead, n, k / 2]: results
  float* out;             // [lead, n, k]
  uint8_t* passes;        // [lead, n, k]: 1 where x lies between both ends of its block
} hb_round_task;

HB_EXPORT int hb_fake_quantize_interface(void);
// Returns 0, or 2 for an instruction set that cannot run here or blocks that it does not know.
HB_EXPORT int hb_round_given(int isa, const hb_round_task* task);
}

struct hb_fake {
  int (*round_given)(const hb_round_task* task);
};

extern "C" {
extern const hb_fake hb_fake_baseline;
extern const hb_fake hb_fake_avx2;
extern const hb_fake hb_fake_avx512;
}
