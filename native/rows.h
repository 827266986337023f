// Consecutive elements of a row: W at a time, widened to FP32, narrowed when they are stored.
#pragma once
#include "tile.h"

namespace {

typedef uint16_t HalfShorts __attribute__((vector_size(2 * W)));
typedef uint8_t QuarterBytes __attribute__((vector_size(W)));

HB_INLINE F load_row(const void* x, int type, int64_t at) {
  if (type == HB_FP32) return load<F>((const float*)x + at);
  const I wide = (I) __builtin_convertvector(load<HalfShorts>((const uint16_t*)x + at), U);
  return type == HB_BF16 ? floats(wide << 16) : widen_half(wide);
}

// The same where only `count` elements are left; the others are zero.
HB_INLINE F load_row(const void* x, int type, int64_t at, int64_t count) {
  if (count >= W) return load_row(x, type, at);
  if (count <= 0) return F{};
  alignas(64) char spare[4 * W] = {};
  const int width = type == HB_FP32 ? 4 : 2;
  memcpy(spare, (const char*)x + at * width, (size_t)count * (size_t)width);
  return load_row(spare, type, 0);
}

HB_INLINE void store_bytes(uint8_t* p, I v, int64_t count) {
  const QuarterBytes narrow = __builtin_convertvector((U)v, QuarterBytes);
  memcpy(p, &narrow, count < W ? (size_t)count : sizeof narrow);
}

}  // namespace
