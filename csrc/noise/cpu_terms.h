// The arguments that all noise ops on the CPU share: they are checked, and prepared once for all
// tensors of a call.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <string_view>
#include <vector>

#include "cpu_task.h"
#include "noise.h"

namespace pseuzo {

struct NamedNoise {
  const char* name;
  Noise noise;
};
constexpr NamedNoise kNoises[] = {
    {"hadamard", Noise::kHadamard},
    {"hadamard-fp16", Noise::kHadamardFp16},
    {"normal", Noise::kNormal},
    {"rademacher", Noise::kRademacher},
};

// Returns none if the noise is not implemented here. The reference then makes or refuses it.
inline std::optional<Noise> noise_of(std::string_view name) {
  for (const NamedNoise& known : kNoises)
    if (name == known.name) return known.noise;
  return std::nullopt;
}

inline Dtype dtype_of(const char* op, const at::Tensor& x) {
  if (x.scalar_type() == at::kFloat) return Dtype::kFp32;
  if (x.scalar_type() == at::kBFloat16) return Dtype::kBf16;
  TORCH_CHECK(x.scalar_type() == at::kHalf, op, ": x must be float32, bfloat16 or float16, got ",
              x.scalar_type(), "; convert it");
  return Dtype::kFp16;
}

inline void check_dense(const char* op, const char* name, const at::Tensor& x) {
  TORCH_CHECK(x.device().is_cpu(), op, ": ", name, " must be on the CPU, got ", x.device(),
              "; call once per device");
  TORCH_CHECK(x.is_contiguous(), op, ": ", name, " must be contiguous, got strides ", x.strides(),
              "; call .contiguous()");
  const int64_t n_bytes = static_cast<int64_t>(x.storage().nbytes());
  TORCH_CHECK(x.numel() == 0 || n_bytes >= (x.storage_offset() + x.numel()) * x.element_size(), op,
              ": the memory of ", name, " was freed (its storage has ", n_bytes,
              " bytes), as offloading and sharding do; call ", op, " while it is there");
}

// Calls the reference. It is registered for every backend, so it also runs for no backend at all.
template <typename Op, typename... Args>
auto in_plain_torch(const char* name, Op*, const Args&... args) {
  const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Op>();
  return op.redispatch(c10::DispatchKeySet(), args...);
}

// The masks of a call: a limit for each tensor, and a seed, or no seed for masks of small elements.
// A default-constructed one means that there are no masks.
struct Masks {
  at::ArrayRef<double> limits;
  Mask kind = Mask::kNone;
  uint64_t hash = 0;

  Masks() = default;
  Masks(const char* op, at::ArrayRef<double> limits, const std::optional<at::Tensor>& seed)
      : limits(limits), kind(seed ? Mask::kRandom : Mask::kSmall) {
    if (!seed) return;
    check_dense(op, "mask_seed", *seed);
    TORCH_CHECK(seed->scalar_type() == at::kLong && seed->numel() == 1, op,
                ": mask_seed must be int64 [1], got ", seed->scalar_type(), " ", seed->sizes());
    hash = splitmix64(static_cast<uint64_t>(*seed->const_data_ptr<int64_t>()));
  }

  void set(Task& task, size_t t) const {
    task.mask = kind;
    task.mask_hash = hash;
    task.limit = kind == Mask::kNone ? 0 : static_cast<float>(limits[t]);
  }
};

// The hashed seeds and the rounded coefficients, which all tensors of a call share. counts: how
// many of them each step has.
struct Terms {
  std::vector<uint64_t> hashes;
  std::vector<float> coefs;
  std::vector<float>
      powers;  // one a step: a factor of its sums beside the scale; NaN: the step is skipped
  Noise noise;

  Terms(const char* op, const at::Tensor& seeds, const at::Tensor& coefs_in, at::IntArrayRef counts,
        Noise noise)
      : noise(noise) {
    check_dense(op, "seeds", seeds);
    check_dense(op, "coefs", coefs_in);
    TORCH_CHECK(seeds.scalar_type() == at::kLong, op, ": seeds must be int64, got ",
                seeds.scalar_type());
    TORCH_CHECK(coefs_in.scalar_type() == at::kFloat, op, ": coefs must be float32, got ",
                coefs_in.scalar_type());
    TORCH_CHECK(seeds.numel() == coefs_in.numel(), op, ": as many coefs as seeds are needed, got ",
                seeds.numel(), " seeds and ", coefs_in.numel(), " coefs");
    const int64_t* const s = seeds.const_data_ptr<int64_t>();
    const float* const c = coefs_in.const_data_ptr<float>();
    const FloatMode mode;
    hashes.resize(seeds.numel());
    std::transform(s, s + seeds.numel(), hashes.begin(), splitmix64);
    coefs.assign(c, c + seeds.numel());
    float* of_step = coefs.data();
    for (const int64_t count : counts) {
      if (noise_for(count) == Noise::kHadamardFp16) {
        powers.push_back(fp16_coefs(of_step, count));
      } else {
        std::transform(of_step, of_step + count, of_step, round17);
        const bool finite =
            std::all_of(of_step, of_step + count, [](float c) { return std::isfinite(c); });
        powers.push_back(finite ? 1 : std::numeric_limits<float>::quiet_NaN());
      }
      of_step += count;
    }
  }

  // Whether a step changes nothing, since a coefficient is not finite.
  bool skips(int64_t step) const { return std::isnan(powers[step]); }

  // A single term is not rounded to half precision.
  Noise noise_for(int64_t K) const {
    return noise == Noise::kHadamardFp16 && K < 2 ? Noise::kHadamard : noise;
  }

  float scale_for(int64_t step, double noise_scale) const {
    const FloatMode mode;
    const bool hadamard = noise == Noise::kHadamard || noise == Noise::kHadamardFp16;
    return static_cast<float>((hadamard ? kHadamardScale : 1.0) * noise_scale) * powers[step];
  }

  // Gives tasks their seeds, which depend on their streams and are kept in `room`.
  void set(std::vector<Task>& tasks, std::vector<Seed>& room) const {
    const int keys = noise == Noise::kNormal ? 2 : 1;
    room.clear();
    for (const Task& task : tasks)
      for (int i = 0; i < keys; i++)
        for (int64_t k = task.first_term; k < task.first_term + task.K; k++)
          room.push_back(
              make_seed(hashes[k], task.stream, i ? kKeyNoiseHigh : kKeyNoise, coefs[k]));
    const Seed* seeds = room.data();
    for (Task& task : tasks) {
      task.noise = noise_for(task.K);
      task.seeds = seeds;
      seeds += keys * task.K;
    }
  }
};

// It is not worth waking a thread for fewer chunks: these are about 30,000 normals.
inline int64_t grain_of(const Terms& terms) {
  return std::max<int64_t>(1, 16 / std::max<int64_t>(1, terms.hashes.size()));
}

}  // namespace pseuzo
