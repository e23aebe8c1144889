// A task of the noise ops, which cpu.cpp makes, and the vector code of cpu_isa.cpp that does it.
#pragma once

#include <cstdint>

#include "noise.h"

#if defined(__x86_64__)
#define PSEUZO_X86 1
#include <immintrin.h>
#endif

namespace pseuzo {

enum class Noise { kHadamard, kHadamardFp16, kRademacher, kNormal };
enum class Dtype { kFp32, kBf16, kFp16 };
// Which elements take noise: all, those with |x| <= limit, a share `limit` of all, at random, or
// those that bytes are given for.
enum class Mask { kNone, kSmall, kRandom, kGiven };

constexpr int kBatch = 16;  // seeds at a time; "hadamard-fp16" is defined by it

struct Adam;
struct Outer;

// The work on one tensor.
struct Task {
  int64_t first_term;  // its K terms begin there among those of the call
  int64_t K;
  const Seed* seeds;  // [K]; "normal": [2, K], for kKeyNoise and for kKeyNoiseHigh
  Noise noise;
  Dtype dtype;
  bool stochastic;
  uint64_t rounding_hash;
  uint32_t stream;
  float keep;
  float scale;
  bool noisy;  // else the noise is 0, and none is made
  Mask mask;   // with one there is an src, whose other elements are copied, to the bit
  float limit;
  uint64_t mask_hash;
  const uint8_t* takes;  // kGiven: a byte for each element of a piece, not 0 where it takes noise
  int64_t takes_first;   // the position of the first one in the whole tensor
  bool sign;             // only the sign of the sum is added, times step
  float step;
  const Outer* outer;   // null, or what is added in place of noise, times scale
  int64_t outer_first;  // the position of its first element, counted in rows of its own n elements
  const Adam* adam;     // null: the sum of the noise is added, and not Adam's step
};

// A product of thin factors, left [m, R] and right [R, n]; see pseuzo_kernels/low_rank.py.
struct Outer {
  const float* left;
  const float* right;
  int64_t m, n, R;
};

// Adam's step from the seeds of the last steps, one task each; see pseuzo_kernels/adam.py.
struct Adam {
  float beta1, beta2, first, second, eps;
  const Task* steps;  // [n], the oldest first
  int64_t n;
};

// An instruction set that the vector code was compiled for.
struct Isa {
  const char* name;
  // Elements first .. last - 1 of a tensor; src (or null) and dst point at element `first`.
  void (*add_noise_span)(const Task&, int64_t first, int64_t last, const char* src, char* dst);
  bool supported;  // by this CPU
};

const Isa* chosen_isa();

// Rounds to nearest and keeps subnormals while it lives: torch.set_flush_denormal and other
// libraries change both, for each thread.
class FloatMode {
 public:
#if defined(PSEUZO_X86)
  FloatMode() : saved_(_mm_getcsr()) { _mm_setcsr(0x1F80); }
  ~FloatMode() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
  FloatMode() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" : : "r"(uint64_t{0}));
  }
  ~FloatMode() { asm volatile("msr fpcr, %0" : : "r"(saved_)); }

 private:
  uint64_t saved_;
#else
  FloatMode() {}
#endif
};

}  // namespace pseuzo
