// Fake quantization for one instruction set: loops over 16 elements that the compiler turns into vectors.
#include <string.h>

#include "fake_quantize.h"

namespace {

constexpr int kLanes = 16;

// One group of 16 elements of a block.
inline void round16(const hb_round_task& t, int table, const float* x, float global, float inverse, float scale,
                    float low, float high, uint8_t* codes, float* out, uint8_t* passes) {
  const float* thresholds = t.thresholds + 16 * table;
  const uint8_t* level_codes = t.level_codes + 16 * table;
  const float* values = t.values + 16 * table;
  float z[kLanes];
  int32_t level[kLanes] = {};
  uint8_t code[kLanes];
  for (int i = 0; i < kLanes; i++) z[i] = x[i] * global * inverse;
  for (int j = 0; j < 15; j++) {
    const float threshold = thresholds[j];
    for (int i = 0; i < kLanes; i++) level[i] += z[i] >= threshold;
  }
  for (int i = 0; i < kLanes; i++) code[i] = level_codes[level[i]];
  for (int i = 0; i < kLanes; i++) out[i] = values[code[i]] * scale;
  for (int i = 0; i < kLanes; i++) passes[i] = x[i] >= low && x[i] <= high;
  for (int i = 0; i < kLanes / 2; i++) codes[i] = (uint8_t)(code[2 * i] | code[2 * i + 1] << 4);
}

int round_given(const hb_round_task* task) {
  const hb_round_task& t = *task;
  if (t.columns <= 0 || t.columns % kLanes || t.k % t.columns) return 2;
  const int64_t blocks = t.k / t.columns;
  for (int64_t row = 0; row < t.lead * t.n; row++) {
    const float global = t.inverse_global ? t.inverse_global[row / t.n] : 1.0f;
    for (int64_t b = 0; b < blocks; b++) {
      const int64_t block = row * blocks + b;
      const int table = t.chosen ? t.chosen[block] : 0;
      const float scale = t.scale[block];
      const float one = t.lowest[table] * scale, other = t.highest[table] * scale;
      const float low = one < other ? one : other, high = one < other ? other : one;
      for (int64_t i = 0; i < t.columns; i += kLanes) {
        const int64_t at = row * t.k + b * t.columns + i;
        round16(t, table, t.x + at, global, t.inverse[block], scale, low, high, t.codes + at / 2, t.out + at,
                t.passes + at);
      }
    }
  }
  return 0;
}

}  // namespace

extern "C" const hb_fake HB_NAME = {round_given};
