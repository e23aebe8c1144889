// window_step on a GPU: one launch writes the new entry, projects grad on the window and finishes
// the coefficients.
//
// Alignment to the last position makes the paired part of every row contiguous, so all is rows by n
// = positions * width columns. A thread owns V columns; blockIdx.x runs over columns, blockIdx.y
// over rows, of which only those that are the first of their group (leaders) have work. For a
// leader, a block sums do and grad over the rows of the group, so that each row is read once, and
// multiplies the sum of grad with the group's row of each old entry.
//
// Threads add in fp32. Blocks add in fp64, and so does the last block, which sums their parts.
// Every sum has a fixed order and the grid depends on shapes alone, so equal inputs give equal
// bits. Blocks read old entries and write the new one, so they need no order among themselves.
//
// There are no torch headers, and threads use barriers alone, so that tests can run this source on
// a CPU.

#include <cuda_fp16.h>

#include <cfloat>

#include "window.h"

#ifndef PSEUZO_LAUNCH
#define PSEUZO_LAUNCH(kernel, grid, block, stream, ...) \
  kernel<<<grid, block, 0, stream>>>(__VA_ARGS__)
#endif
#ifndef PSEUZO_WINDOW_THREADS
#define PSEUZO_WINDOW_THREADS 256
#endif
#ifndef PSEUZO_WINDOW_BLOCKS
#define PSEUZO_WINDOW_BLOCKS 512
#endif

namespace pseuzo {
namespace {

constexpr int kThreads = PSEUZO_WINDOW_THREADS;  // per block
constexpr int kBlocks =
    PSEUZO_WINDOW_BLOCKS;                   // rows are spread over blocks until there are so many
constexpr int kTile = 16;                   // old entries at a time, one accumulator each
constexpr int kBatch = 4;                   // rows of a group at a time
constexpr int kFinders = kThreads / kTile;  // threads that look for a group's row in one entry
constexpr int kAdders = 8;                  // threads that add up one row of terms in a block
constexpr int kFinishers = 16;              // threads that add up one coefficient over blocks
static_assert(kThreads > kTile && kThreads % kTile == 0 && kThreads % kAdders == 0 &&
              kThreads % kFinishers == 0);

__device__ inline bool is_finite(float x) { return fabsf(x) <= FLT_MAX; }

template <typename T, int V>
struct alignas(sizeof(T) * V) Vector {
  T x[V];
};

// x[i] = element at + i of source. BYTES per element; 0: ask dtype, slower but one code for all
// types.
template <int BYTES, int V>
__device__ inline void load(const void* source, WindowDtype dtype, int64_t at, float (&x)[V]) {
  if (BYTES == 4 || (BYTES == 0 && dtype == WindowDtype::kFloat)) {
    const auto v =
        *reinterpret_cast<const Vector<float, V>*>(static_cast<const float*>(source) + at);
#pragma unroll
    for (int i = 0; i < V; ++i) x[i] = v.x[i];
  } else {
    const auto v =
        *reinterpret_cast<const Vector<uint16_t, V>*>(static_cast<const uint16_t*>(source) + at);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      x[i] = dtype == WindowDtype::kHalf ? __half2float(__ushort_as_half(v.x[i]))
                                         : __uint_as_float(static_cast<unsigned int>(v.x[i]) << 16);
    }
  }
}

// The slot of output k; k = used - 1 is the newest.
__device__ inline int64_t slot_of(const WindowStep& step, int64_t k) {
  const int64_t slot = step.slot - (step.used - 1 - k);
  return slot < 0 ? slot + step.capacity : slot;
}

__device__ inline unsigned int* ticket_of(const WindowStep& step, int64_t blocks) {
  return reinterpret_cast<unsigned int*>(step.scratch + step.used * blocks);
}

// Whether no row before `row` is in its group. The result is the same for all threads of the block.
__device__ inline bool is_leader(const int64_t* group, int64_t row) {
  __shared__ int s_found;
  __syncthreads();  // the last answer has been read
  if (threadIdx.x == 0) s_found = 0;
  __syncthreads();
  const int64_t id = group[row];
  for (int64_t i = threadIdx.x; i < row; i += kThreads) {
    if (group[i] == id) s_found = 1;
  }
  __syncthreads();
  return s_found == 0;
}

// Lists the rows of group id among kThreads rows from `first` on, in order, and returns their
// number.
__device__ inline int list_members(const int64_t* group, int64_t rows, int64_t id, int64_t first,
                                   int64_t* s_members) {
  __shared__ int s_match[kThreads];
  const int64_t row = first + threadIdx.x;
  const int match = row < rows && group[row] == id;
  s_match[threadIdx.x] = match;
  __syncthreads();
  const int n = rows - first < kThreads ? static_cast<int>(rows - first) : kThreads;
  int rank = 0, total = 0;
  for (int i = 0; i < n; ++i) {
    rank += i < static_cast<int>(threadIdx.x) ? s_match[i] : 0;
    total += s_match[i];
  }
  if (match) s_members[rank] = row;
  __syncthreads();
  return total;
}

// s_old[e]: the row of values, slot * rows_max + i, that old entry tile + e has for the group of
// `row`; -1: none.
__device__ inline void find_old_rows(const WindowStep& step, int64_t row, int64_t tile,
                                     int64_t* s_old) {
  const int64_t n_old = step.used - 1;
  __syncthreads();  // the last rows have been read
  if (threadIdx.x < kTile) {
    int64_t found = -1;
    if (step.group == nullptr && tile + threadIdx.x < n_old) {
      const int64_t at = slot_of(step, tile + threadIdx.x) * step.rows_max + row;
      if (step.counts[at] > 0) found = at;
    }
    s_old[threadIdx.x] = found;
  }
  __syncthreads();
  if (step.group == nullptr) return;
  const int e = threadIdx.x / kFinders;
  if (tile + e < n_old) {
    const int64_t id = step.group[row];
    const int64_t entry = slot_of(step, tile + e) * step.rows_max;
    for (int64_t i = entry + threadIdx.x % kFinders; i < entry + step.rows_max; i += kFinders) {
      if (step.groups[i] == id && step.counts[i] > 0) s_old[e] = i;  // one at most: a leader
    }
  }
  __syncthreads();
}

// partials[(tile + e) * blocks] += the block's sum of acc[e]; likewise own for the newest entry.
// Clears acc and own.
__device__ inline void flush(const WindowStep& step, float (&acc)[kTile], float& own, int64_t tile,
                             double* s_sums, double* partials, int64_t blocks) {
  __shared__ float s_terms[kTile + 1]
                          [kThreads + kAdders];  // padded: the adders of 4 rows read 32 banks
  const int thread = threadIdx.x;
#pragma unroll
  for (int e = 0; e < kTile; ++e) {
    s_terms[e][thread] = acc[e];
    acc[e] = 0;
  }
  s_terms[kTile][thread] = own;
  own = 0;
  __syncthreads();
  for (int i = thread; i < (kTile + 1) * kAdders; i += kThreads) {
    double sum = 0;
    for (int t = i % kAdders; t < kThreads; t += kAdders) sum += s_terms[i / kAdders][t];
    s_sums[i] = sum;
  }
  __syncthreads();
  const int64_t n_old = step.used - 1;
  if (thread <= kTile && (thread == kTile || tile + thread < n_old)) {
    double sum = 0;
    for (int i = 0; i < kAdders; ++i) sum += s_sums[thread * kAdders + i];
    partials[(thread == kTile ? n_old : tile + thread) * blocks] += sum;
  }
}

// Adds some rows to the sums. All loads come before the first use, so the memory is waited for once
// and not once per row. A row of -1 adds nothing, and the first is never -1.
template <int O, int G, int V, int N>
__device__ inline void add_rows(const WindowStep& step, const int64_t (&rows)[N], int64_t column,
                                float& own, float (&sum_do)[V], float (&sum_e)[V]) {
  const bool difference = step.o0 == nullptr;
  float d[N][V], e[N][V], clean[N][V];
#pragma unroll
  for (int r = 0; r < N; ++r) {
    const int64_t at = (rows[r] < 0 ? rows[0] : rows[r]) * step.positions * step.width + column;
    load<O>(step.o1, step.o_dtype, at, d[r]);
    load<O>(difference ? step.o1 : step.o0, step.o_dtype, at, clean[r]);
    load<G>(step.grad, step.grad_dtype, at, e[r]);
  }
#pragma unroll
  for (int r = 0; r < N; ++r) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const float change = rows[r] < 0 ? 0 : difference ? d[r][i] : d[r][i] - clean[r][i];
      const float slope = rows[r] < 0 ? 0 : e[r][i];
      own += change * slope;
      sum_do[i] += change;
      sum_e[i] += slope;
    }
  }
}

// Adds the blocks' partial sums, in the last block; not inlined into every instantiation of the
// kernel.
__device__ __noinline__ void finish(const WindowStep& step, int64_t blocks) {
  __shared__ double s_sums[kThreads];
  __shared__ int s_bad, s_drop;
  const int64_t thread = threadIdx.x;
  if (thread == 0) s_bad = s_drop = step.loss != nullptr && !is_finite(*step.loss);
  for (int64_t first = 0; first < step.used; first += kThreads / kFinishers) {
    const int64_t k = first + thread / kFinishers;
    double sum = 0;
    if (k < step.used) {
      for (int64_t b = thread % kFinishers; b < blocks; b += kFinishers) {
        sum += __ldcg(step.scratch + k * blocks + b);  // not from this multiprocessor's own cache
      }
    }
    s_sums[thread] = sum;
    __syncthreads();
    if (k < step.used && thread % kFinishers == 0) {
      double dot = 0;
      for (int i = 0; i < kFinishers; ++i) dot += s_sums[thread + i];
      const double weight = pow(step.momentum, static_cast<double>(step.used - 1 - k)) / step.eps;
      const float coef = static_cast<float>(dot * weight);
      step.coefs[k] = coef;
      if (!is_finite(coef)) {
        s_bad = 1;
        if (k == step.used - 1) s_drop = 1;
      }
    }
    __syncthreads();
  }
  for (int64_t k = thread; k < step.used; k += kThreads) {
    if (s_bad) step.coefs[k] = 0;
    step.seeds_out[k] = k == step.used - 1 ? step.seed : step.seeds[slot_of(step, k)];
  }
  if (s_drop) {
    for (int64_t i = thread; i < step.rows_max; i += kThreads)
      step.counts[step.slot * step.rows_max + i] = 0;
  }
  if (thread == 0) {
    step.seeds[step.slot] = step.seed;
    *step.skipped += s_bad;
    *step.found_inf = static_cast<float>(s_bad);
    *ticket_of(step, blocks) = 0;
  }
}

template <int O, int G, int V>
__global__ void __launch_bounds__(kThreads, 2)
    window_step_kernel(const __grid_constant__ WindowStep step) {
  __shared__ int64_t s_members[kThreads];
  __shared__ int64_t s_old[kTile];
  __shared__ double s_sums[(kTile + 1) * kAdders];
  __shared__ int s_last;

  const int64_t thread = threadIdx.x;
  const int64_t n = step.positions * step.width;
  const int64_t row_stride = step.positions_max * step.width;
  const int64_t offset = row_stride - n;  // of the first position that is paired
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * kThreads + thread) * V;
  const bool active = column < n;
  const int64_t blocks = static_cast<int64_t>(gridDim.x) * gridDim.y;
  const int64_t block = static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x;
  double* const partials = step.scratch + block;  // [used, blocks]
  const int64_t n_old = step.used - 1;
  const bool one_tile = n_old <= kTile;

  for (int64_t k = thread; k < step.used; k += kThreads)
    partials[k * blocks] = 0;  // flush has barriers

  float own = 0, acc[kTile] = {};
  for (int64_t row = blockIdx.y; row < step.rows_max; row += gridDim.y) {
    const int64_t id = row < step.rows && step.group != nullptr ? step.group[row] : row;
    const bool leader = row < step.rows && (step.group == nullptr || is_leader(step.group, row));
    int64_t members = leader;
    if (leader) {
      float sum_do[V] = {}, sum_e[V] = {};
      if (step.group == nullptr) {
        const int64_t batch[1] = {row};
        if (active) add_rows<O, G>(step, batch, column, own, sum_do, sum_e);
      } else {
        members = 0;
        for (int64_t first = row; first < step.rows; first += kThreads) {
          const int listed = list_members(step.group, step.rows, id, first, s_members);
          members += listed;
          for (int i = 0; active && i < listed; i += kBatch) {
            int64_t batch[kBatch];
#pragma unroll
            for (int r = 0; r < kBatch; ++r) batch[r] = i + r < listed ? s_members[i + r] : -1;
            add_rows<O, G>(step, batch, column, own, sum_do, sum_e);
          }
        }
      }

      float* const mean = step.values + (step.slot * step.rows_max + row) * row_stride;
      for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + thread; i < offset;
           i += static_cast<int64_t>(gridDim.x) * kThreads) {
        mean[i] = 0;
      }
      if (active) {
        Vector<float, V> m;
#pragma unroll
        for (int i = 0; i < V; ++i) m.x[i] = sum_do[i] / static_cast<float>(members);
        *reinterpret_cast<Vector<float, V>*>(mean + offset + column) = m;
      }

      for (int64_t tile = 0; tile < n_old; tile += kTile) {
        find_old_rows(step, row, tile, s_old);
        if (active) {
          float old[kTile][V];  // all loads before the first use
#pragma unroll
          for (int e = 0; e < kTile; ++e) {
#pragma unroll
            for (int i = 0; i < V; ++i) old[e][i] = 0;
            if (s_old[e] >= 0)
              load<4>(step.values, WindowDtype::kFloat, s_old[e] * row_stride + offset + column,
                      old[e]);
          }
#pragma unroll
          for (int e = 0; e < kTile; ++e) {
#pragma unroll
            for (int i = 0; i < V; ++i) acc[e] += old[e][i] * sum_e[i];
          }
        }
        if (!one_tile) flush(step, acc, own, tile, s_sums, partials, blocks);
      }
    }
    if (blockIdx.x == 0 && thread == 0) {
      step.counts[step.slot * step.rows_max + row] = static_cast<int32_t>(members);
      if (row < step.rows) step.groups[step.slot * step.rows_max + row] = id;
    }
  }
  if (one_tile) flush(step, acc, own, 0, s_sums, partials, blocks);

  // The last block to arrive sees what all others wrote, and finishes.
  __threadfence();
  __syncthreads();
  if (thread == 0)
    s_last = atomicAdd(ticket_of(step, blocks), 1u) == static_cast<unsigned int>(blocks - 1);
  __syncthreads();
  if (!s_last) return;
  __threadfence();

  finish(step, blocks);
}

int64_t bytes_of(WindowDtype dtype) { return dtype == WindowDtype::kFloat ? 4 : 2; }

bool aligned(const void* p, int64_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

// Columns per thread.
int vector_of(const WindowStep& step) {
  const int64_t o = 4 * bytes_of(step.o_dtype), g = 4 * bytes_of(step.grad_dtype);
  const bool four = step.width % 4 == 0 && aligned(step.values, 16) && aligned(step.o0, o) &&
                    aligned(step.o1, o) && aligned(step.grad, g);
  return four ? 4 : 1;
}

struct Grid {
  int64_t x, y;
};

Grid grid_of(const WindowStep& step) {
  const int64_t columns = static_cast<int64_t>(kThreads) * vector_of(step);
  const int64_t n = step.positions * step.width;
  const int64_t x = n > columns ? (n - 1) / columns + 1 : 1;
  const int64_t wanted = (kBlocks - 1) / x + 1;
  const int64_t y = step.rows < wanted ? step.rows : wanted;
  return {x, y > 1 ? y : 1};
}

}  // namespace

int64_t window_step_scratch(const WindowStep& step) {
  const Grid grid = grid_of(step);
  return step.used * grid.x * grid.y + 1;
}

cudaError_t launch_window_step(const WindowStep& step, cudaStream_t stream) {
  const Grid grid = grid_of(step);
  if (grid.x > INT32_MAX) return cudaErrorInvalidConfiguration;
  const int64_t o = bytes_of(step.o_dtype), g = bytes_of(step.grad_dtype);
  auto kernel = window_step_kernel<0, 0, 1>;
  if (vector_of(step) == 4) {
    kernel = o == 2 ? (g == 2 ? window_step_kernel<2, 2, 4> : window_step_kernel<2, 4, 4>)
                    : (g == 2 ? window_step_kernel<4, 2, 4> : window_step_kernel<4, 4, 4>);
  }
  PSEUZO_LAUNCH(kernel, dim3(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y)),
                dim3(kThreads), stream, step);
  return cudaGetLastError();
}

}  // namespace pseuzo
