// The exported products: checks, activations, and the panels of a weight shared among threads.
#include "experts.h"
#include "repack.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <cpuid.h>
#define HB_X86 1
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace {

#if HB_X86
// A bit for each instruction set that the processor has and whose registers the operating system saves.
unsigned find_isas() {
  unsigned isas = 1u << HB_LINEAR_BASELINE, a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return isas;
  const unsigned needed = 1u << 12 | 1u << 27 | 1u << 29;  // FMA, XGETBV, F16C
  if ((c & needed) != needed) return isas;
  unsigned saved, high;
  __asm__("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
  if ((saved & 0x6) != 0x6 || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return isas;
  const unsigned leaves = a, avx2 = 1u << 5 | 1u << 8;  // AVX2, BMI2
  if ((b & avx2) != avx2) return isas;
  isas |= 1u << HB_LINEAR_AVX2;
  const unsigned avx512 = avx2 | 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;  // F, DQ, BW, VL
  const bool wide = (b & avx512) == avx512 && (saved & 0xe6) == 0xe6, vnni = c & 1u << 11;
  unsigned more = 0;
  if (leaves >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) more = a;
  if (more & 1u << 4) isas |= 1u << HB_LINEAR_AVXVNNI;
  if (wide) isas |= 1u << HB_LINEAR_AVX512;
  if (wide && vnni) isas |= 1u << HB_LINEAR_AVX512VNNI;
  if (wide && vnni && more & 1u << 5) isas |= 1u << HB_LINEAR_AVX512BF16;
  return isas;
}
#elif defined(__aarch64__) && defined(__linux__)
unsigned find_isas() {
  return 1u << HB_LINEAR_BASELINE | (getauxval(AT_HWCAP) & 1u << 20 ? 1u << HB_LINEAR_DOTPROD : 0u);
}
#elif defined(__aarch64__) && defined(__APPLE__)
unsigned find_isas() { return 1u << HB_LINEAR_BASELINE | 1u << HB_LINEAR_DOTPROD; }
#else
unsigned find_isas() { return 1u << HB_LINEAR_BASELINE; }
#endif

const hb_linear_kernels* linear_kernels(int isa) {
  if (!hb_linear_has_isa(isa)) return nullptr;
  switch (isa) {
#if HB_X86
    case HB_LINEAR_AVX2: return &hb_linear_avx2;
    case HB_LINEAR_AVXVNNI: return &hb_linear_avxvnni;
    case HB_LINEAR_AVX512: return &hb_linear_avx512;
    case HB_LINEAR_AVX512VNNI: return &hb_linear_avx512vnni;
    case HB_LINEAR_AVX512BF16: return &hb_linear_avx512bf16;
#elif defined(__aarch64__)
    case HB_LINEAR_DOTPROD: return &hb_linear_dotprod;
#endif
    default: return &hb_linear_baseline;
  }
}

// Whether products know what a weight is made of.
bool is_known(const hb_weight& w) {
  if (w.lead < 1 || w.n < 1 || w.k < 1 || w.code_kind < HB_CODE_TABLE || w.code_kind > HB_CODE_FLOAT) return false;
  if (w.block != 0 && w.block != 16 && w.block != 32 && w.block != 64 && w.block != 128) return false;
  if (w.table_count != 1 && w.table_count != 2 && w.table_count != 4) return false;
  if (w.table_count > 1 && (w.block != 16 || w.code_kind != HB_CODE_TABLE)) return false;
  if (w.code_kind == HB_CODE_HIF4 && (w.block != 64 || w.scale_kind != HB_SCALE_E6M2)) return false;
  if (w.block == 16 && w.code_kind != HB_CODE_TABLE && w.code_kind != HB_CODE_FLOAT) return false;
  if (w.block_rows != 1 && (w.block_rows % 16 || w.scale_kind != HB_SCALE_FP32 || w.block == 16)) return false;
  if (w.offset_kind && (w.block == 0 || w.block_rows != 1)) return false;
  if (w.rotation == 0) return w.block == 0 || w.block_rows != 1 || w.k % w.block == 0;
  return w.k % w.rotation == 0 && (w.rotation == 16 || w.rotation == 32 || w.rotation == 64 || w.rotation == 128);
}

hb_product decided(hb_product p, bool exact) {
  if (p.mode == HB_AUTO) p.mode = exact ? HB_EXACT : HB_INT8;
  return p;
}

int run_linear(const hb_linear_kernels& kernels, const hb_weight& w, int64_t lead, const hb_product& p) {
  const int arithmetic = kernels.arithmetic(&w, p.mode, p.x_type);
  hb_row_layout layout;
  kernels.layout(&w, arithmetic, &layout);
  Buffer<char> prepared(p.rows * layout.bytes);
  Buffer<const void*> rows(p.rows);
  if (!prepared.data || !rows.data) return 3;
  for (int64_t t = 0; t < p.rows; ++t) rows.data[t] = prepared.data + t * layout.bytes;
  const int64_t x_size = p.x_type == HB_FP32 ? 4 : 2, panels = (w.n + 15) / 16;
  const bool alone = is_small(w.n * w.k * p.rows, p.mode);
  parallel(p.rows, alone || p.rows < 8, [&](int64_t t) {
    Buffer<float> scratch(layout.units * 32);
    kernels.prepare(&w, lead, arithmetic, (const char*)p.x + t * p.x_stride * x_size, p.x_type,
                    prepared.data + t * layout.bytes, scratch.data);
  });
  const int64_t wanted = alone ? 1 : (int64_t)pool.threads * 4, parts = wanted < panels ? wanted : panels;
  parallel(parts, alone, [&](int64_t i) {
    kernels.panels(&w, lead, arithmetic, panels * i / parts, panels * (i + 1) / parts, rows.data, p.rows, p.y, p.y_type,
                   p.y_stride);
  });
  return 0;
}

int run_dense(const hb_linear_kernels& kernels, const hb_dense& w, hb_product p) {
  const bool as_is = p.x_type == HB_FP32 || (kernels.dense_bf16 && p.x_type == HB_BF16 && w.type == HB_BF16);
  const int64_t k = (w.k + 31) / 32 * 32;
  Buffer<float> wide(as_is ? 0 : p.rows * k);
  if (!wide.data) return 3;
  const bool alone = is_small(w.n * w.k * p.rows, HB_EXACT);
  if (!as_is) {
    hb_weight plain = {};  // rows are widened as for a weight without a rotation
    plain.n = 1;
    plain.k = w.k;
    plain.code_kind = HB_CODE_FLOAT;
    hb_row_layout layout;
    kernels.layout(&plain, 0, &layout);
    Buffer<char> row(layout.bytes);
    if (!row.data) return 3;
    for (int64_t t = 0; t < p.rows; ++t) {
      kernels.prepare(&plain, 0, 0, (const char*)p.x + t * p.x_stride * 2, p.x_type, row.data, nullptr);
      memcpy(wide.data + t * k, row.data, (size_t)k * 4);
    }
    p.x = wide.data;
    p.x_type = HB_FP32;
    p.x_stride = k;
  }
  const int64_t groups = (w.n + 3) / 4, wanted = alone ? 1 : (int64_t)pool.threads * 4;
  const int64_t parts = wanted < groups ? wanted : groups;
  parallel(parts, alone, [&](int64_t i) {
    const int64_t end = groups * (i + 1) / parts * 4;
    kernels.dense(&w, &p, groups * i / parts * 4, end < w.n ? end : w.n);
  });
  return 0;
}

}  // namespace

extern "C" {

int hb_linear_interface(void) {
  return 1 * 1000003 + (int)(sizeof(hb_weight) + sizeof(hb_dense) + sizeof(hb_product) + sizeof(hb_mixture));
}

int hb_linear_has_isa(int isa) {
  static unsigned known = 0;
  unsigned isas = __atomic_load_n(&known, __ATOMIC_RELAXED);
  if (!isas) {
    isas = find_isas();
    __atomic_store_n(&known, isas, __ATOMIC_RELAXED);
  }
  return isa >= 0 && isa < HB_LINEAR_ISAS && isas >> isa & 1;
}

void hb_packed_bytes(const hb_weight* weight, int64_t* codes, int64_t* scales, int64_t* offsets) {
  const Repacking r(*weight);
  *codes = r.code_bytes();
  *scales = r.scale_bytes();
  *offsets = r.offset_bytes();
}

void hb_repack(const hb_weight* weight, const void* codes, const void* scales, const void* offsets) {
  Repacking(*weight).all_panels<true>((uint8_t*)codes, (uint8_t*)scales, (uint8_t*)offsets);
}

void hb_unpack(const hb_weight* weight, void* codes, void* scales, void* offsets) {
  Repacking(*weight).all_panels<false>((uint8_t*)codes, (uint8_t*)scales, (uint8_t*)offsets);
}

void hb_unpack_rows(const hb_weight* weight, int64_t lead, const int64_t* rows, int64_t count, void* codes,
                    void* scales, void* offsets) {
  Repacking(*weight).some_rows(lead, rows, count, (uint8_t*)codes, (uint8_t*)scales, (uint8_t*)offsets);
}

int hb_linear(int isa, const hb_weight* weight, int64_t lead, const hb_product* product) {
  const StandardArithmetic guard;
  const hb_linear_kernels* kernels = linear_kernels(isa);
  if (!kernels || !is_known(*weight) || lead < 0 || lead >= weight->lead) return 2;
  const bool cheap = kernels->dense_bf16 && product->x_type == HB_BF16 && product->rows <= HB_FEW_ROWS;
  return run_linear(*kernels, *weight, lead, decided(*product, cheap));
}

int hb_linear_dense(int isa, const hb_dense* weight, const hb_product* product) {
  const StandardArithmetic guard;
  const hb_linear_kernels* kernels = linear_kernels(isa);
  return kernels ? run_dense(*kernels, *weight, *product) : 2;
}

int hb_experts(int isa, const hb_mixture* mixture, const hb_product* product) {
  const StandardArithmetic guard;
  const hb_linear_kernels* kernels = linear_kernels(isa);
  const hb_weight &up = *mixture->gate_up, &down = *mixture->down;
  if (!kernels || !is_known(up) || !is_known(down) || up.lead != down.lead) return 2;
  if (mixture->gated && up.n % 2) return 2;
  if (down.k != (mixture->gated ? up.n / 2 : up.n)) return 2;
  const hb_product p = decided(*product, true);
  return Experts{*kernels, *mixture, p}.run();
}

void hb_set_threads(int threads) { pool.set_threads(threads); }

int hb_threads(void) { return pool.threads; }
}
