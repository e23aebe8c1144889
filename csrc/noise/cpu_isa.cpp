// The vector code of the noise ops on the CPU, and which instruction set is used.
//
// One inner source, cpu_kernel.inc, is compiled for AVX-512, for AVX2 and for any CPU, and chosen
// at run time; the bits are the same. It does V columns of a chunk at a time, with all 16 planes.
// The sums over all seeds are made before x is read, so x is read and written once for any K.
// Arithmetic limits it: for 256 normals 106 vector instructions with AVX-512, for which a core has
// two ports, and 16 stores of 512 bits, each of which keeps both ports busy for 0.6 cycles
// (measured on a Xeon with AMX); with AVX2 290 instructions, on three ports.
#include <c10/util/Exception.h>

#include <atomic>
#include <cstdlib>
#include <string>
#include <vector>

#include "cpu_task.h"
#include "isa.h"
#include "noise.h"

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the vector code expects the low half of a 64-bit lane first"
#endif

#define PSEUZO_INLINE static inline __attribute__((always_inline))
#define PSEUZO_PRAGMA(text) _Pragma(#text)
#ifdef __clang__
#define PSEUZO_UNROLL(n) PSEUZO_PRAGMA(unroll n)
#define PSEUZO_TARGET(isa) \
  PSEUZO_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define PSEUZO_TARGET_END PSEUZO_PRAGMA(clang attribute pop)
#pragma STDC FP_CONTRACT OFF
#else
#define PSEUZO_UNROLL(n) PSEUZO_PRAGMA(GCC unroll n)
#define PSEUZO_TARGET(isa) PSEUZO_PRAGMA(GCC push_options) PSEUZO_PRAGMA(GCC target(isa))
#define PSEUZO_TARGET_END PSEUZO_PRAGMA(GCC pop_options)
#pragma GCC diagnostic ignored \
    "-Wmaybe-uninitialized"  // GCC 12's own AVX-512 header, hundreds of them
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

namespace pseuzo {
namespace {

// clang-format off: the order of the includes matters
namespace plain {
#include "simd_plain.inc"
#include "cpu_kernel.inc"
}  // namespace plain

#ifdef PSEUZO_X86
PSEUZO_TARGET("avx2,fma,f16c")
namespace avx2 {
#include "simd_avx2.inc"
#include "cpu_kernel.inc"
}  // namespace avx2
PSEUZO_TARGET_END

PSEUZO_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
namespace avx512 {
#include "simd_avx512.inc"
#include "cpu_kernel.inc"
}  // namespace avx512
PSEUZO_TARGET_END
#endif
// clang-format on

const std::vector<Isa>& isas() {  // the best first
  static const std::vector<Isa> all = [] {
    std::vector<Isa> isas;
#ifdef PSEUZO_X86
    __builtin_cpu_init();
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                          __builtin_cpu_supports("f16c");
    const bool has_avx512 =
        has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    isas.push_back({"avx512", avx512::add_noise_span, has_avx512});
    isas.push_back({"avx2", avx2::add_noise_span, has_avx2});
#endif
    isas.push_back({"plain", plain::add_noise_span, true});
    return isas;
  }();
  return all;
}

const Isa* find_isa(const std::string& name) {
  std::string known;
  for (const Isa& isa : isas()) {
    if (isa.name == name && isa.supported) return &isa;
    if (isa.supported) known += (known.empty() ? "" : ", ") + std::string(isa.name);
  }
  TORCH_CHECK(false, "PSEUZO_CPU_ISA: must be one of ", known, " on this CPU, got '", name,
              "'; unset it for the best");
}

const Isa* default_isa() {
  if (const char* name = std::getenv("PSEUZO_CPU_ISA")) return find_isa(name);
  for (const Isa& isa : isas())
    if (isa.supported) return &isa;
  return nullptr;
}

std::atomic<const Isa*>& isa_in_use() {
  static std::atomic<const Isa*> isa{default_isa()};
  return isa;
}

}  // namespace

const Isa* chosen_isa() { return isa_in_use(); }
std::string cpu_isa() { return chosen_isa()->name; }
void set_cpu_isa(const std::string& name) { isa_in_use() = find_isa(name); }

std::vector<std::string> cpu_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : isas()) names.push_back(isa.name);
  return names;
}

}  // namespace pseuzo
