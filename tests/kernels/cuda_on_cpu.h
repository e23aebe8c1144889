// Runs CUDA kernels on one CPU core, so that tests can check their source: include this, then the
// .cu file as C++.
//
// Each CUDA thread of a block is a fibre that runs until its next barrier; blocks run one after
// another. Kernels may use barriers, __shared__, atomics and fences, but no warp intrinsics. The
// order of threads and blocks can be changed: equal bits in all orders say that no result hangs on
// a race within a block, or on which block comes last. A barrier that not all threads reach is an
// error. What this cannot show: whether fences between blocks suffice.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <random>
#include <utility>
#include <vector>

#undef __global__
#undef __device__
#undef __shared__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(...)
#define __grid_constant__
#define __noinline__

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace emulated {

enum Order { kForward, kBackward, kShuffled };
inline Order order = kForward;
inline cudaError_t error = cudaSuccess;

struct Fibre {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(1 << 16);
  int barrier = 0;  // line of the barrier it waits at; 0: it returned
};
inline std::vector<Fibre> fibres;
inline ucontext_t scheduler;
inline unsigned current;
inline std::function<void()> body;

inline void run_body() {
  body();
  fibres[current].barrier = 0;
}

inline void barrier(int line) {
  Fibre& self = fibres[current];
  self.barrier = line;
  swapcontext(&self.context, &scheduler);
}

inline std::vector<unsigned> ordered(unsigned n) {
  std::vector<unsigned> indices(n);
  for (unsigned i = 0; i < n; ++i) indices[i] = order == kBackward ? n - 1 - i : i;
  static std::mt19937 random(1);
  if (order == kShuffled) std::shuffle(indices.begin(), indices.end(), random);
  return indices;
}

inline void run_block() {
  for (Fibre& fibre : fibres) {
    getcontext(&fibre.context);
    fibre.context.uc_stack.ss_sp = fibre.stack.data();
    fibre.context.uc_stack.ss_size = fibre.stack.size();
    fibre.context.uc_link = &scheduler;
    makecontext(&fibre.context, run_body, 0);
  }
  const unsigned n = static_cast<unsigned>(fibres.size());
  do {
    for (const unsigned thread : ordered(n)) {
      current = thread;
      threadIdx = {thread, 0, 0};
      swapcontext(&scheduler, &fibres[thread].context);
    }
    for (const Fibre& fibre : fibres) {
      if (fibre.barrier != fibres[0].barrier)
        error = cudaErrorLaunchFailure;  // not all are at the same barrier
    }
  } while (error == cudaSuccess && fibres[0].barrier != 0);
}

template <typename Kernel, typename... Args>
void launch(Kernel kernel, dim3 grid, dim3 block, const Args&... args) {
  gridDim = grid;
  blockDim = block;
  if (fibres.size() != block.x) fibres = std::vector<Fibre>(block.x);
  body = [&] { kernel(args...); };
  for (const unsigned i : ordered(grid.x * grid.y)) {
    blockIdx = {i % grid.x, i / grid.x, 0};
    if (error == cudaSuccess) run_block();
  }
}

inline cudaError_t take_error() { return std::exchange(error, cudaSuccess); }

}  // namespace emulated

#define __syncthreads() emulated::barrier(__LINE__)
#define cudaGetLastError() emulated::take_error()
#define PSEUZO_LAUNCH(kernel, grid, block, stream, ...) \
  ((void)stream, emulated::launch(kernel, grid, block, __VA_ARGS__))

inline void __threadfence() {}
inline unsigned int atomicAdd(unsigned int* at, unsigned int by) {
  return std::exchange(*at, *at + by);
}
template <typename T>
T __ldcg(const T* at) {
  return *at;
}
inline float __uint_as_float(unsigned int bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
