// window_step on a CPU: one pass over the outputs and the paired rows of the window, sums in fp64.
//
// Alignment to the last position makes the paired part of every row contiguous, so all is rows by n
// = positions * width columns. A task is the rows of one group by kTile columns: it sums do and
// grad over the rows, writes the mean of do, and multiplies the sum of grad with the group's row of
// each old entry. Tasks are split into parts by their number alone, and the sums of the parts are
// added in order, so the bits do not depend on the number of threads.

#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <c10/util/bit_cast.h>
#include <c10/util/irange.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "checks.h"

namespace pseuzo {
namespace {

constexpr int64_t kTile = 1024;  // columns of a task: its sums stay in the first-level cache
constexpr int64_t kParts = 256;  // at most
constexpr int64_t kLanes = 8;    // partial sums of a dot product, for SIMD
constexpr int64_t kGrain = 32768;
static_assert(kTile % kLanes == 0);

float widened(float x) { return x; }
float widened(at::BFloat16 x) { return x; }

// It has masks instead of branches, so that a loop over it becomes SIMD. Subnormals stay exact even
// if the CPU flushes them.
float widened(at::Half x) {
  const uint32_t size = x.x & 0x7FFF, sign = static_cast<uint32_t>(x.x & 0x8000) << 16;
  const uint32_t is_subnormal = -static_cast<uint32_t>(size < 0x400);
  const uint32_t is_not_finite = -static_cast<uint32_t>(size >= 0x7C00);
  const uint32_t normal = (size << 13) + 0x38000000 + (is_not_finite & 0x38000000);
  const uint32_t subnormal =
      c10::bit_cast<uint32_t>(static_cast<float>(static_cast<int32_t>(size)) * 0x1p-24f);
  return c10::bit_cast<float>((is_subnormal & subnormal) | (~is_subnormal & normal) | sign);
}

template <typename T>
void widen(const at::Tensor& x, int64_t at, int64_t n, float* out) {
  const T* source = x.const_data_ptr<T>() + at;
  for (int64_t i = 0; i < n; ++i) out[i] = widened(source[i]);
}

void load(const at::Tensor& x, int64_t at, int64_t n, float* out) {
  switch (x.scalar_type()) {
    case at::kFloat: return widen<float>(x, at, n, out);
    case at::kBFloat16: return widen<at::BFloat16>(x, at, n, out);
    default: return widen<at::Half>(x, at, n, out);
  }
}

double sum_of(const double (&lanes)[kLanes]) {
  double sum = 0;
  for (const double lane : lanes) sum += lane;
  return sum;
}

// Adds a row to the sums and returns <d, e>. n: a multiple of kLanes.
double add_row(const float* d, const float* e, int64_t n, double* sum_d, double* sum_e) {
  double lanes[kLanes] = {};
  for (int64_t i = 0; i < n; i += kLanes) {
    for (int64_t l = 0; l < kLanes; ++l) {
      const double change = d[i + l], slope = e[i + l];
      sum_d[i + l] += change;
      sum_e[i + l] += slope;
      lanes[l] += change * slope;
    }
  }
  return sum_of(lanes);
}

double dot(const float* x, const double* y, int64_t n) {
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t l = 0; l < kLanes; ++l) lanes[l] += x[i + l] * y[i + l];
  }
  for (int64_t l = 0; i + l < n; ++l) lanes[l] += x[i + l] * y[i + l];
  return sum_of(lanes);
}

// The rows of the batch by group. Leaders are the first rows of their groups, in order.
struct Pairing {
  std::vector<int64_t> leaders;
  std::vector<int32_t> sizes;  // of the leaders' groups
  std::vector<int64_t> next;   // next row of the same group, -1 after the last; one per row
  std::vector<int64_t>
      old;  // [entries, leaders]: the paired row of values, slot * rows_max + i; -1: none
};

Pairing pair_rows(const at::Tensor& groups, const at::Tensor& counts,
                  const std::optional<at::Tensor>& group, int64_t rows,
                  const std::vector<int64_t>& old_slots) {
  Pairing p;
  p.next.assign(rows, -1);
  const int64_t* ids = group ? group->const_data_ptr<int64_t>() : nullptr;
  std::unordered_map<int64_t, int64_t> leader_of;
  std::vector<int64_t> last;  // row of each leader's group so far
  for (const auto row : c10::irange(rows)) {
    const auto [found, is_new] = leader_of.try_emplace(ids ? ids[row] : row, p.leaders.size());
    if (is_new) {
      p.leaders.push_back(row);
      p.sizes.push_back(1);
      last.push_back(row);
    } else {
      const int64_t leader = found->second;
      p.next[last[leader]] = row;
      last[leader] = row;
      ++p.sizes[leader];
    }
  }
  const int64_t n_leaders = p.leaders.size(), rows_max = counts.size(1);
  p.old.assign(old_slots.size() * n_leaders, -1);
  for (const auto k : c10::irange(old_slots.size())) {
    for (const auto i : c10::irange(rows_max)) {
      const int64_t at = old_slots[k] * rows_max + i;
      if (counts.const_data_ptr<int32_t>()[at] <= 0) continue;
      const auto found = leader_of.find(ids ? groups.const_data_ptr<int64_t>()[at] : i);
      if (found != leader_of.end()) p.old[k * n_leaders + found->second] = at;
    }
  }
  return p;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> window_step_cpu(
    const at::Tensor& values, const at::Tensor& seeds, const at::Tensor& groups,
    const at::Tensor& counts, const at::Tensor& skipped, const std::optional<at::Tensor>& o0,
    const at::Tensor& o1, const at::Tensor& grad, const std::optional<at::Tensor>& group,
    const std::optional<at::Tensor>& loss, int64_t seed, int64_t slot, int64_t used,
    double momentum, double eps) {
  check_window_step(values, seeds, groups, counts, skipped, o0, o1, grad, group, loss, slot, used);
  const int64_t capacity = values.size(0), rows_max = values.size(1), width = values.size(3);
  const int64_t rows = o1.size(0), n = o1.size(1) * width;
  const int64_t row_stride = values.size(2) * width, offset = row_stride - n;

  std::vector<int64_t> old_slots;  // oldest first
  for (int64_t age = used - 1; age > 0; --age)
    old_slots.push_back((slot - age + capacity) % capacity);
  const int64_t n_old = used - 1;
  const Pairing pairing = pair_rows(groups, counts, group, rows, old_slots);
  const int64_t n_leaders = pairing.leaders.size();

  float* const ring = values.mutable_data_ptr<float>();
  float* const entry = ring + slot * rows_max * row_stride;
  const int64_t tiles = (n + kTile - 1) / kTile, tasks = n_leaders * tiles;
  const int64_t parts = std::min(tasks, kParts);
  std::vector<double> partial(parts * used, 0.0);  // [parts, used], newest last

  const auto run_task = [&](int64_t task, double* sums) {
    const int64_t leader = task / tiles, column = task % tiles * kTile,
                  m = std::min(kTile, n - column);
    const int64_t padded = (m + kLanes - 1) / kLanes * kLanes;
    float d[kTile], e[kTile], clean[kTile];
    double sum_d[kTile], sum_e[kTile];
    std::fill_n(sum_d, padded, 0.0);
    std::fill_n(sum_e, padded, 0.0);
    std::fill(d + m, d + padded, 0.0f);
    std::fill(e + m, e + padded, 0.0f);
    for (int64_t row = pairing.leaders[leader]; row >= 0; row = pairing.next[row]) {
      load(o1, row * n + column, m, d);
      load(grad, row * n + column, m, e);
      if (o0) {
        load(*o0, row * n + column, m, clean);
        for (int64_t i = 0; i < m; ++i) d[i] -= clean[i];
      }
      sums[n_old] += add_row(d, e, padded, sum_d, sum_e);
    }
    float* const mean = entry + pairing.leaders[leader] * row_stride + offset + column;
    const double size = pairing.sizes[leader];
    for (int64_t i = 0; i < m; ++i) mean[i] = static_cast<float>(sum_d[i] / size);
    for (int64_t k = 0; k < n_old; ++k) {
      const int64_t old = pairing.old[k * n_leaders + leader];
      if (old >= 0) sums[k] += dot(ring + old * row_stride + offset + column, sum_e, m);
    }
  };
  // Multiply-adds of a part; for less than kGrain of them another thread costs more than it gives.
  const int64_t work = parts == 0 ? 1 : (rows + n_old * n_leaders) * n / parts + 1;
  const int64_t grain = std::max<int64_t>(1, kGrain / work);
  at::parallel_for(0, parts, grain, [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; ++part) {
      for (int64_t task = part * tasks / parts; task < (part + 1) * tasks / parts; ++task) {
        run_task(task, partial.data() + part * used);
      }
    }
  });

  auto* const slot_counts = counts.mutable_data_ptr<int32_t>() + slot * rows_max;
  auto* const slot_groups = groups.mutable_data_ptr<int64_t>() + slot * rows_max;
  std::fill_n(slot_counts, rows_max, 0);
  for (const auto row : c10::irange(rows))
    slot_groups[row] = group ? group->const_data_ptr<int64_t>()[row] : row;
  for (const auto leader : c10::irange(n_leaders)) {
    slot_counts[pairing.leaders[leader]] = pairing.sizes[leader];
    std::fill_n(entry + pairing.leaders[leader] * row_stride, offset, 0.0f);
  }
  seeds.mutable_data_ptr<int64_t>()[slot] = seed;

  at::Tensor seeds_out = at::empty({used}, seeds.options());
  at::Tensor coefs = at::empty({used}, values.options());
  at::Tensor found_inf = at::empty({1}, values.options());
  float* const c = coefs.mutable_data_ptr<float>();
  const bool loss_ok = !loss || std::isfinite(*loss->const_data_ptr<float>());
  bool ok = loss_ok;
  for (const auto k : c10::irange(used)) {
    double sum = 0;
    for (const auto part : c10::irange(parts)) sum += partial[part * used + k];
    c[k] = static_cast<float>(sum * (std::pow(momentum, static_cast<double>(used - 1 - k)) / eps));
    ok = ok && std::isfinite(c[k]);
    seeds_out.mutable_data_ptr<int64_t>()[k] =
        seeds.const_data_ptr<int64_t>()[k == n_old ? slot : old_slots[k]];
  }
  if (!loss_ok || !std::isfinite(c[n_old])) std::fill_n(slot_counts, rows_max, 0);
  if (!ok) std::fill_n(c, used, 0.0f);
  *skipped.mutable_data_ptr<int64_t>() += !ok;
  *found_inf.mutable_data_ptr<float>() = ok ? 0.0f : 1.0f;
  return {seeds_out, coefs, found_inf};
}

}  // namespace

TORCH_LIBRARY_IMPL(pseuzo, CPU, m) { m.impl("window_step", &window_step_cpu); }

}  // namespace pseuzo
