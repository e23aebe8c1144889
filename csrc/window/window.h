// The CUDA window step in plain types: kernels and launcher are in window.cu, their caller in
// cuda.cpp.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace pseuzo {

enum class WindowDtype : int32_t { kFloat, kBFloat16, kHalf };

// The arguments of window_step, see pseuzo_kernels/reference.py. All tensors are contiguous and on
// one device.
struct WindowStep {
  // State, written in place.
  float* values;     // [capacity, rows_max, positions_max, width]
  int64_t* seeds;    // [capacity]
  int64_t* groups;   // [capacity, rows_max]
  int32_t* counts;   // [capacity, rows_max]
  int64_t* skipped;  // []
  // Inputs.
  const void* o0;        // [rows, positions, width] o_dtype; null: o1 is the difference
  const void* o1;        // [rows, positions, width] o_dtype
  const void* grad;      // [rows, positions, width] grad_dtype
  const int64_t* group;  // [rows]; null: each row its own
  const float* loss;     // []; null: finite
  // Outputs, newest last.
  int64_t* seeds_out;  // [used]
  float* coefs;        // [used]
  float* found_inf;    // [1]
  // window_step_scratch() doubles. The last holds the ticket: zero bytes before the launch, and
  // again after it.
  double* scratch;
  int64_t capacity, rows_max, positions_max, width;
  int64_t rows, positions;  // rows <= rows_max, positions <= positions_max
  int64_t seed, slot, used;
  double momentum, eps;
  WindowDtype o_dtype, grad_dtype;
};

// The length of scratch in doubles; depends on shapes and alignment alone.
int64_t window_step_scratch(const WindowStep& step);

// Launches one kernel on `stream`, without waiting. Returns the launch's error.
cudaError_t launch_window_step(const WindowStep& step, cudaStream_t stream);

}  // namespace pseuzo
