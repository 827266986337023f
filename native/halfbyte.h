// The C interface of the kernels: plain buffers and descriptors, no Python, no torch.
#pragma once
#include <stdint.h>

#if defined(_WIN32)
#define HB_EXPORT __declspec(dllexport)
#else
#define HB_EXPORT __attribute__((visibility("default")))
#endif

extern "C" {

enum { HB_BF16 = 0, HB_FP16 = 1, HB_FP32 = 2 };
enum { HB_BASELINE = 0, HB_AVX2 = 1, HB_AVX512 = 2 };
enum { HB_BLOCK = 0, HB_AFFINE_BIAS = 1, HB_AFFINE_ZERO_POINT = 2, HB_HIF4 = 3 };
enum {
  HB_SCALE_E4M3 = 0,
  HB_SCALE_E8M0 = 1,
  HB_SCALE_E3M3 = 2,
  HB_SCALE_BF16 = 3,
  HB_SCALE_FP32 = 4,
  HB_SCALE_E6M2 = 5
};
enum { HB_SSE = 0, HB_MAE = 1, HB_MAX = 2 };
enum { HB_FLOOR = 0, HB_EVEN = 1, HB_RCEIL = 2 };
enum {
  HB_E2M1 = 0,
  HB_INT_SIGN_MAGNITUDE = 1,
  HB_INT_TWOS_COMPLEMENT = 2,
  HB_IF4_INT = 3,
  HB_INT_OFFSET = 4,
  HB_E4M3 = 5,
  HB_E2M1_SPECIAL = 6,
  HB_LADDER = 7
};

// One element table. Thresholds ascend; z gets ladder_codes[number of thresholds <= z]; unused ones are +inf.
typedef struct {
  int32_t kind;
  float top;
  float lowest, highest;  // the values' range: elements beyond it are saturated
  float limit;            // largest scale that keeps every value finite
  int32_t exponent;       // of the largest value, for power-of-two scales
  float even_from;        // mantissa from which the rule "even" adds one
  float rceil_from;       // mantissa above which the rule "rceil" adds one
  int32_t high;           // largest scale code for this table
  int32_t zero_code;      // code of zero
  float thresholds[16];   // the last one unused
  float ladder_values[16];
  int32_t ladder_codes[16];
  float values[256];
} hb_table;

// A format together with a search: all that the kernels know about either.
typedef struct {
  int32_t family;
  int32_t bits;
  int32_t rows, columns;  // of a block; -1 for all
  int32_t scale_kind, scale_bits, scale_low;
  int32_t table_count;
  int32_t order[4];
  int32_t shared_base;
  int32_t four_over_six;
  int32_t metric, rule;
  int32_t single;  // one candidate: nothing to judge
  int32_t offset_count, ratio_count;
  int32_t offsets[256];
  // base + above >= high, or base + below <= low: this candidate and an earlier one are clipped to the same code
  int32_t above[256], below[256];
  float ratios[64];  // of scales; of range ends for affine formats
  int32_t levels;
  hb_table tables[4];
} hb_codec;

// Error of what was encoded; calls add to it.
typedef struct {
  double squared_error, squares;
  double max_error;
  int64_t saturated;
  int64_t blocks[4];  // blocks that chose each table
} hb_stats;

// Buffers of one call. x is [lead, n, k], contiguous; weights [weight_lead, k] or null.
typedef struct {
  const void* x;
  int32_t type;
  int64_t lead, n, k;
  const float* tensor_scale;  // [lead] or null
  const float* divisor;       // [lead] or null: decoding divides by it
  const float* weights;
  int64_t weight_lead;
  void* codes;
  void* scales;
  void* offsets;
  hb_stats* stats;  // or null
} hb_task;

// Buffers of rounding with error feedback. Arrays over columns are in the order in which columns are rounded.
typedef struct {
  const void* x;  // [lead, n, k]
  int32_t type;
  int64_t lead, n, k;
  const float* tensor_scale;  // [lead] or null
  // What a candidate of a block is judged by: sum of gain * u * u. With feedback u is the error of a column after
  // taking the earlier errors of the block times their coefficients from it; without, the error of the nearest
  // value plus those. Row j of a block's matrix has the coefficients of its columns 0..j-1.
  int32_t judge_feedback;
  const float* judge;  // [k / block, block, block] or null: none
  const float* gain;   // [k]
  const float* inner;  // the same for the rounding itself; null: to nearest. Blocks of 16 where scales are given
  const float* outer;  // [k / 16, k, 16] or null: coefficients of all columns for the columns of 16, by groups of 16
  const int32_t* block_of;  // [k]: the block whose given scale a column has; null: scales are chosen
  uint8_t* codes;           // [lead, n, k], a byte each
  void* scales;             // [lead, n, k / block]
  void* offsets;
} hb_gptq_task;

// A group of rows that are rounded one after the other, each taking the errors of earlier ones. Arrays as above.
typedef struct {
  const float* x;  // [n, k], over the global scale
  int64_t n, k;
  int32_t judge_feedback;
  const float* judge;
  const float* gain;
  const float* inner;
  const float* outer;
  const int32_t* block_of;
  const float* coupling;  // [n, n]: the share of row i's error that row j takes, at [i, j]
  uint8_t* codes;         // [n, k]
  void* scales;           // [n, k / block]
  void* offsets;
  float* error;  // [n, k]: the target of each row minus its values
} hb_rows_task;

// A group of rows whose codes move as long as the weighted error falls; scales stay.
typedef struct {
  int64_t n, k;
  float* values;       // [n, k] of the codes, over the global scale
  uint8_t* codes;      // [n, k]
  const void* scales;  // [n, k / block]
  const void* offsets;
  const int32_t* places;  // [k]: the block of each column
  float* gradient;        // [n, k]: half the derivative of the error by each value
  const float* coupling;  // [n, n]: the metric of these rows
  const float* hessian;   // [k, k]
  float* moved;           // [n, k]: zeros; becomes the changes times the Hessian
  float margin;           // a move gains at least this share of its own cost
  int64_t limit;          // moves of a row
  int64_t* moves;         // how many there were
} hb_descent_task;

HB_EXPORT int hb_interface(void);
HB_EXPORT int hb_has_isa(int isa);
// Largest magnitude of each of `lead` runs of `count` elements; returns 1 where a NaN or infinity is among them.
HB_EXPORT int hb_amax(int isa, const void* x, int type, int64_t lead, int64_t count, float* out);
// Fills codes, scales and offsets. Returns 0, 1 for a NaN or infinity in x, 2 for a codec it does not know.
HB_EXPORT int hb_encode(int isa, const hb_codec* codec, const hb_task* task);
// Writes decoded values to x (HB_BF16 or HB_FP32). Returns 0 or 2.
HB_EXPORT int hb_decode(int isa, const hb_codec* codec, const hb_task* task);
// Adds the error of the codes against x to stats. Returns 0, 1 where a decoded value is not finite, or 2.
HB_EXPORT int hb_compare(int isa, const hb_codec* codec, const hb_task* task);
// Rounds with error feedback. Weights must be finite. Returns 0, 2 for a codec it does not know, 3 without memory.
HB_EXPORT int hb_gptq(int isa, const hb_codec* codec, const hb_gptq_task* task);
// Rounds a group of rows with feedback between them. Returns 0, 2 for a codec it does not know, 3 without memory.
HB_EXPORT int hb_round_rows(int isa, const hb_codec* codec, const hb_rows_task* task);
// Moves codes of a group of rows. Returns 0, 2 for a codec it does not know, 3 without memory.
HB_EXPORT int hb_descend(int isa, const hb_codec* codec, const hb_descent_task* task);
// Takes left [count, rows] transposed times right [count, k] from out [rows, k], one product after the other. Returns 0.
HB_EXPORT int hb_subtract_products(int isa, float* out, const float* left, const float* right, int64_t count,
                                   int64_t rows, int64_t k);
// Rotates x FP32 [lead, rows, k] in place, in blocks of `size` (16, 32, 64, 128) columns: by the Hadamard matrix times
// `norm`, or, with swaps [lead, k / size, steps], by steps that first exchange a channel (< size) with the block's first;
// `inverse` undoes it. Returns 0, 2 for another size.
HB_EXPORT int hb_rotate(int isa, float* x, int64_t lead, int64_t rows, int64_t k, int size, float norm,
                        const uint8_t* swaps, int steps, int inverse);
// Factors `count` symmetric FP64 matrices m [k, k], k a multiple of 8, m = L L^T: m becomes L^T with its rows over
// their diagonals, inverse [k, k] the inverse of L with its columns over their diagonals, gain [k] the squares of
// the diagonals. Returns 0, 1 where a matrix is not positive definite, 2 for another k.
HB_EXPORT int hb_factor(int isa, int64_t count, int64_t k, double* m, double* inverse, double* gain);
}
