// From the layout of a file to panels of 16 rows and back; both have the same codes, scales and offsets.
#pragma once
#include <string.h>

#include "linear.h"

namespace {

struct Repacking {
  const hb_weight& w;
  int64_t panels, units, blocks, file_blocks, file_rows, width;
  int code_bits, scale_size, offset_size;

  explicit Repacking(const hb_weight& weight) : w(weight) {
    code_bits = w.code_kind == HB_CODE_INT8 || w.code_kind == HB_CODE_UINT8 || w.code_kind == HB_CODE_E4M3 ? 8 : 4;
    const bool half = w.scale_kind == HB_SCALE_BF16 || w.scale_kind == HB_SCALE_FP16;
    scale_size = half ? 2 : w.scale_kind == HB_SCALE_FP32 || w.scale_kind == HB_SCALE_E6M2 ? 4 : 1;
    offset_size = w.offset_kind == HB_NO_OFFSET ? 0 : w.offset_kind == HB_BIAS ? 2 : 1;
    panels = (w.n + 15) / 16;
    units = (w.k + 31) / 32;
    file_blocks = w.block == 0 ? 1 : (w.k + w.block - 1) / w.block;
    blocks = w.block == 16 ? 2 * units : file_blocks;
    file_rows = w.block_rows == 0 ? 1 : (w.n + w.block_rows - 1) / w.block_rows;
    width = w.k * code_bits / 8;
  }

  int64_t rows_with_scales() const { return w.block_rows == 1 ? 16 : 1; }
  int64_t code_bytes() const { return w.lead * panels * units * 64 * code_bits; }
  int64_t scale_bytes() const { return w.lead * panels * blocks * rows_with_scales() * scale_size; }
  int64_t offset_bytes() const { return w.lead * panels * blocks * 16 * offset_size; }

  // Eight nibbles of neighbouring columns as bytes that hold columns j and j + 4; and back.
  static uint32_t shuffled(uint32_t v) {
    const uint32_t low = v & 0xffff, high = v >> 16;
    return spread(low) | spread(high) << 4;
  }
  static uint32_t spread(uint32_t v) {
    v = (v | v << 8) & 0x00ff00ff;
    return (v | v << 4) & 0x0f0f0f0f;
  }
  static uint32_t unshuffled(uint32_t v) { return gathered(v & 0x0f0f0f0f) | gathered(v >> 4 & 0x0f0f0f0f) << 16; }
  static uint32_t gathered(uint32_t v) {
    v = (v | v >> 4) & 0x00ff00ff;
    return (v | v >> 8) & 0xffff;
  }

  template <bool PACK>
  void code_row(uint8_t* packed, uint8_t* file) const {
    for (int64_t at = 0; at < width; at += 4, packed += 64) {
      const size_t bytes = width - at < 4 ? (size_t)(width - at) : 4;
      uint32_t word = 0;
      if (PACK) {
        memcpy(&word, file + at, bytes);
        if (code_bits == 4) word = shuffled(word);
        memcpy(packed, &word, 4);
      } else {
        memcpy(&word, packed, 4);
        if (code_bits == 4) word = unshuffled(word);
        memcpy(file + at, &word, bytes);
      }
    }
  }

  template <bool PACK>
  static void move(uint8_t* packed, uint8_t* file, int size) {
    if (PACK) memcpy(packed, file, (size_t)size);
    else memcpy(file, packed, (size_t)size);
  }

  template <bool PACK>
  void row_blocks(uint8_t* packed, uint8_t* file, int size) const {
    for (int64_t block = 0; block < file_blocks; ++block) move<PACK>(packed + block * 16 * size, file + block * size, size);
  }

  // One panel of one matrix; file arrays of the matrix.
  template <bool PACK>
  void panel(int64_t lead, int64_t number, uint8_t* codes, uint8_t* scales, uint8_t* offsets) const {
    const int64_t at = lead * panels + number;
    for (int64_t r = 0; r < 16 && number * 16 + r < w.n; ++r) {
      const int64_t row = number * 16 + r;
      code_row<PACK>((uint8_t*)w.codes + at * units * 64 * code_bits + 4 * r, codes + row * width);
      if (w.block_rows == 1)
        row_blocks<PACK>((uint8_t*)w.scales + (at * blocks * 16 + r) * scale_size,
                         scales + row * file_blocks * scale_size, scale_size);
      if (offset_size)
        row_blocks<PACK>((uint8_t*)w.offsets + (at * blocks * 16 + r) * offset_size,
                         offsets + row * file_blocks * offset_size, offset_size);
    }
    if (w.block_rows == 1) return;
    const int64_t row = w.block_rows == 0 ? 0 : number * 16 / w.block_rows;
    for (int64_t block = 0; block < blocks; ++block)
      move<PACK>((uint8_t*)w.scales + (at * blocks + block) * scale_size,
                 scales + (row * file_blocks + block) * scale_size, scale_size);
  }

  // One row of one matrix as a file has it; scales are the row's own even where rows share them.
  void one_row(int64_t lead, int64_t row, uint8_t* codes, uint8_t* scales, uint8_t* offsets) const {
    const int64_t at = lead * panels + row / 16, r = row % 16, step = rows_with_scales(), first = step == 1 ? 0 : r;
    code_row<false>((uint8_t*)w.codes + at * units * 64 * code_bits + 4 * r, codes);
    for (int64_t block = 0; block < file_blocks; ++block)
      move<false>((uint8_t*)w.scales + ((at * blocks + block) * step + first) * scale_size, scales + block * scale_size,
                  scale_size);
    if (offset_size) row_blocks<false>((uint8_t*)w.offsets + (at * blocks * 16 + r) * offset_size, offsets, offset_size);
  }

  void some_rows(int64_t lead, const int64_t* rows, int64_t count, uint8_t* codes, uint8_t* scales,
                 uint8_t* offsets) const {
    for (int64_t i = 0; i < count; ++i)
      one_row(lead, rows[i], codes + i * width, scales + i * file_blocks * scale_size,
              offsets + i * file_blocks * offset_size);
  }

  template <bool PACK>
  void all_panels(uint8_t* codes, uint8_t* scales, uint8_t* offsets) const {
    if (PACK) {
      memset(w.codes, 0, (size_t)code_bytes());
      memset(w.scales, 0, (size_t)scale_bytes());
      if (offset_size) memset(w.offsets, 0, (size_t)offset_bytes());
    }
    const int64_t scale_rows = w.block_rows == 1 ? w.n : file_rows;
    for (int64_t lead = 0; lead < w.lead; ++lead)
      for (int64_t number = 0; number < panels; ++number)
        panel<PACK>(lead, number, codes + lead * w.n * width, scales + lead * scale_rows * file_blocks * scale_size,
                    offsets ? offsets + lead * w.n * file_blocks * offset_size : nullptr);
  }
};

}  // namespace
