// The noise contract for C++: its constants, and the work that is done once per seed.
// pseuzo_kernels/reference.py defines it in full; the vector code is in cpu_noise.inc.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace pseuzo {

// A chunk is 2048 consecutive elements of a tensor, 16 planes of 128 columns; a column has one
// Philox counter.
constexpr int kChunk = 2048, kPlanes = 16, kPlane = 128;

constexpr uint32_t kPhiloxM0 = 0xD2511F53, kPhiloxM1 = 0xCD9E8D57;  // Salmon et al. 2011
constexpr uint32_t kPhiloxW0 = 0x9E3779B9, kPhiloxW1 = 0xBB67AE85;

struct Key {
  uint32_t k0, k1;
};
constexpr Key kKeyNoise = {0x243F6A88, 0x85A308D3};
constexpr Key kKeyNoiseHigh = {0xA4093822, 0x85A308D3};  // planes 8..15 of "normal"
constexpr Key kKeyRounding = {0x13198A2E, 0x03707344};
constexpr Key kKeyMask = {0x082EFA98, 0xEC4E6C89};  // of random masks

constexpr int kRoundingVersion = 2;  // ROUNDING_VERSION of the reference

constexpr double kHadamardScale = 0.297737326084866;  // 1 / (4 sqrt(0.7050395011901855))

inline uint64_t splitmix64(uint64_t seed) {
  uint64_t z = seed + 0x9E3779B97F4A7C15;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
  return z ^ (z >> 31);
}

// Rounds to 17 significant bits, halves away from zero. b has 7, so c * b is exact, and an fma
// gives the same bits as two roundings.
inline float round17(float c) {
  if (!std::isfinite(c)) return c;  // rounding the bits of a NaN can make -0
  uint32_t bits;
  std::memcpy(&bits, &c, sizeof bits);
  bits = (bits + 0x40) & 0xFFFFFF80;
  std::memcpy(&c, &bits, sizeof c);
  return c;
}

// For "hadamard-fp16": makes c' from K coefs, in place, and returns 2^e, or NaN if the largest is
// above 2^126 or not finite.
inline float fp16_coefs(float* coefs, int64_t K) {
  uint32_t largest = 0;  // as an integer: NaN counts as larger than infinity
  for (int64_t k = 0; k < K; k++) {
    uint32_t bits;
    std::memcpy(&bits, coefs + k, sizeof bits);
    largest = std::max(largest, bits & 0x7FFFFFFF);
  }
  uint32_t bits = std::clamp((largest + 0x7FFFFF) >> 23, 1u, 253u) << 23;
  if (largest > 0x7E800000) bits = 0x7FC00000;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  for (int64_t k = 0; k < K; k++) coefs[k] = std::nearbyint(coefs[k] / power * 1024) / 1024;
  return power;
}

// The parts of Philox's first two rounds that depend on the seed, the stream and the key alone.
// Making them once saves 3 of 14 vector multiplications.
struct Seed {
  uint32_t round1_c2, round2_c0, round2_c2, round3_c2;
  float coef;  // already round17'd
};

inline Seed make_seed(uint64_t hash, uint32_t stream, Key key, float coef) {
  const uint32_t lo = static_cast<uint32_t>(hash), hi = static_cast<uint32_t>(hash >> 32);
  const uint64_t p1 = static_cast<uint64_t>(lo) * kPhiloxM1;
  const uint32_t c0 = static_cast<uint32_t>(p1 >> 32) ^ stream ^ key.k0;
  const uint64_t p0 = static_cast<uint64_t>(c0) * kPhiloxM0;
  Seed seed;
  seed.round1_c2 = hi ^ key.k1;
  seed.round2_c0 = static_cast<uint32_t>(p1) ^ (key.k0 + kPhiloxW0);
  seed.round2_c2 = static_cast<uint32_t>(p0 >> 32) ^ (key.k1 + kPhiloxW1);
  seed.round3_c2 = static_cast<uint32_t>(p0) ^ (key.k1 + 2 * kPhiloxW1);
  seed.coef = coef;
  return seed;
}

}  // namespace pseuzo
