// The C interface of products with quantized weights: packed weights, products, mixtures of experts.
#pragma once
#include "halfbyte.h"

extern "C" {

enum {
  HB_LINEAR_BASELINE = 0,
  HB_LINEAR_AVX2 = 1,
  HB_LINEAR_AVXVNNI = 2,
  HB_LINEAR_AVX512 = 3,
  HB_LINEAR_AVX512VNNI = 4,
  HB_LINEAR_AVX512BF16 = 5,
  HB_LINEAR_DOTPROD = 6,
  HB_LINEAR_ISAS = 7
};
// How a code becomes a number: one of up to four tables of 16 integers; HiF4's integers; signed bytes; unsigned
// bytes; E4M3 bytes; a table of 16 FP32 values.
enum { HB_CODE_TABLE = 0, HB_CODE_HIF4 = 1, HB_CODE_INT8 = 2, HB_CODE_UINT8 = 3, HB_CODE_E4M3 = 4, HB_CODE_FLOAT = 5 };
// How a stored scale becomes a number, beside those of the codec (HB_SCALE_...).
enum { HB_SCALE_FP16 = 6 };
enum { HB_NO_OFFSET = 0, HB_BIAS = 1, HB_ZERO_POINT = 2 };
// HB_AUTO: exact for mixtures of experts, and where it costs little: up to HB_FEW_ROWS rows of BF16 activations on
// processors with products of BF16; else int8.
enum { HB_EXACT = 0, HB_INT8 = 1, HB_AUTO = 2, HB_FEW_ROWS = 8 };
enum { HB_SILU = 0, HB_GELU_TANH = 1, HB_CLAMPED_SWIGLU = 2, HB_RELU2 = 3, HB_IDENTITY = 4 };

// A weight [lead, n, k] in panels of 16 rows, or with codes as a file has them where it is to be packed.
//
// Packed, rows are padded to a multiple of 16 and columns to one of 32. Codes of 4 bits: for each panel and 8 columns
// 64 bytes, of which byte 4r + j has the code of row r and column j in its low half, of column j + 4 in its high half.
// Codes of 8 bits: for each panel and 4 columns 64 bytes, byte 4r + j for row r and column j. Scales and offsets:
// for each panel and block the 16 rows' elements, or one element where all 16 rows share a scale.
typedef struct {
  int64_t lead, n, k;
  int32_t code_kind, table_count;
  int32_t scale_kind, scale_bits;  // selector bits lie above the scale's own
  int32_t negate;                  // the selector does not choose a table but changes the sign
  int32_t offset_kind;
  int32_t block;                   // columns that share a scale: 16, 32, 64, 128 or 0 for all
  int32_t block_rows;              // rows that share a scale: 1, a multiple of 16, or 0 for all
  int32_t center;                  // what was taken from unsigned codes to make them the tables' integers
  int32_t bias;                    // what makes the tables' integers non-negative
  int32_t highest;                 // the largest integer plus the bias
  int8_t tables[4][16];
  float steps[4];                  // values of a table are its integers times this
  float values[16];                // of HB_CODE_FLOAT
  void* codes;
  void* scales;
  void* offsets;
  const float* global_scale;  // [lead] or null
  int32_t divide;             // by it, not times
  const float* row_bias;      // [lead, n] or null: added to the product
  int32_t rotation;           // block size of a rotation of the activations, or 0
  float norm;
  const uint8_t* swaps;  // [lead, k / rotation, swap_steps] or null
  int32_t swap_steps;
} hb_weight;

// A matrix [n, k] of BF16, FP16 or FP32, rows `stride` elements apart.
typedef struct {
  const void* values;
  int32_t type;
  int64_t n, k, stride;
  const float* row_bias;  // [n] or null
} hb_dense;

// Activations [rows, k] and results [rows, n], rows `stride` elements apart.
typedef struct {
  const void* x;
  int32_t x_type;
  int64_t rows, x_stride;
  void* y;
  int32_t y_type;
  int64_t y_stride;
  int32_t mode;
} hb_product;

// A mixture of experts: y = sum over slots of weight * down(activation(gate, up)), slots in their order.
typedef struct {
  const hb_weight* gate_up;    // [experts, 2 * width, k], or [experts, width, k] where not gated
  const hb_weight* down;       // [experts, n, width]
  const int64_t* experts;      // [rows, slots]; slots of other numbers than 0 .. lead - 1 add nothing
  const float* slot_weights;   // [rows, slots]
  int64_t slots;
  int32_t activation, gated, interleaved;  // rows gate, up, gate, up, ... instead of all gates first
  float limit, alpha;                      // of HB_CLAMPED_SWIGLU
} hb_mixture;

HB_EXPORT int hb_linear_interface(void);
HB_EXPORT int hb_linear_has_isa(int isa);
// Bytes of the packed codes, scales and offsets.
HB_EXPORT void hb_packed_bytes(const hb_weight* weight, int64_t* codes, int64_t* scales, int64_t* offsets);
// Fills the packed arrays of a weight from those of a file, and the other way round.
HB_EXPORT void hb_repack(const hb_weight* weight, const void* codes, const void* scales, const void* offsets);
HB_EXPORT void hb_unpack(const hb_weight* weight, void* codes, void* scales, void* offsets);
// The same of rows `rows` [count] of one matrix: codes [count, ...], scales and offsets [count, blocks].
HB_EXPORT void hb_unpack_rows(const hb_weight* weight, int64_t lead, const int64_t* rows, int64_t count, void* codes,
                              void* scales, void* offsets);
// y = x W^T + bias with the matrix `lead` of a weight. Returns 0, 2 for what there is no kernel for, 3 without memory.
HB_EXPORT int hb_linear(int isa, const hb_weight* weight, int64_t lead, const hb_product* product);
HB_EXPORT int hb_linear_dense(int isa, const hb_dense* weight, const hb_product* product);
HB_EXPORT int hb_experts(int isa, const hb_mixture* mixture, const hb_product* product);
// Threads of the library's own pool that one call may use, the caller among them.
HB_EXPORT void hb_set_threads(int threads);
HB_EXPORT int hb_threads(void);
}
