// Divides the work of the noise ops on the CPU among threads.
#include "cpu_pieces.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu_task.h"
#include "cpu_terms.h"
#include "noise.h"

namespace pseuzo {
namespace {

// Several tasks go over this many chunks in turn before the next chunks are read: 16 or 32 KiB stay
// in the L1 cache.
constexpr int64_t kBlock = 4;

// The number of the chunk where a piece begins, and how many chunks it touches.
int64_t first_chunk(const Piece& piece) { return piece.first / kChunk; }

int64_t chunks_of(const Piece& piece) {
  return piece.n ? (piece.first + piece.n - 1) / kChunk - first_chunk(piece) + 1 : 0;
}

}  // namespace

Selection::Selection(const char* op, at::IntArrayRef places, at::ArrayRef<double> limits,
                     const std::optional<at::Tensor>& mask_seed, at::TensorList takes,
                     at::TensorList out)
    : parts_(out.size()),
      masks_(limits.empty() ? Masks() : Masks(op, limits, mask_seed)),
      takes_(takes) {
  const size_t T = out.size();
  TORCH_CHECK((limits.empty() || limits.size() == T) && (takes.empty() || takes.size() == T), op,
              ": limits and takes (or none) must be one per tensor (", T, "), got ", limits.size(),
              " and ", takes.size());
  TORCH_CHECK(limits.empty() || takes.empty(), op, ": one kind of mask can be given, got two");
  TORCH_CHECK(places.empty() || places.size() == 3 * T, op, ": places must be three per tensor (",
              T, "), got ", places.size());
  for (size_t t = 0; t < T; t++) {
    Part& part = parts_[t];
    part.n = out[t].numel();
    part.itemsize = out[t].element_size();
    if (!places.empty()) {
      part.offset = places[3 * t];
      part.width = places[3 * t + 1];
      part.stride = places[3 * t + 2];
    }
    TORCH_CHECK(part.offset >= 0 && part.width >= 0 && part.stride >= 0 &&
                    (part.width == 0 || part.n % part.width == 0),
                op, ": an offset, a width and a stride must not be negative, and whole rows are ",
                "needed, got ", part.offset, ", ", part.width, " and ", part.stride, " for ",
                part.n, " elements");
    if (takes.empty()) continue;
    check_dense(op, "a mask", takes[t]);
    TORCH_CHECK(takes[t].scalar_type() == at::kBool && takes[t].numel() == part.n, op,
                ": a mask must be bool, with the ", part.n, " elements of x, got ",
                takes[t].scalar_type(), " ", takes[t].sizes());
  }
}

void Selection::add(std::vector<Piece>& pieces, size_t t, std::vector<Task> tasks, const char* src,
                    char* dst) const {
  const Part& part = parts_[t];
  const uint8_t* bytes = nullptr;
  if (!takes_.empty()) bytes = static_cast<const uint8_t*>(takes_[t].const_data_ptr());
  const int64_t width = part.width ? part.width : part.n;
  int64_t first = part.offset;
  for (int64_t begin = 0; begin < part.n; begin += width, first += part.stride) {
    for (Task& task : tasks) {
      masks_.set(task, t);
      if (bytes) task.mask = Mask::kGiven;
      task.takes = bytes ? bytes + begin : nullptr;
      task.takes_first = first;
      task.outer_first = first - begin;
    }
    const int64_t at = begin * part.itemsize;
    pieces.push_back({src ? src + at : nullptr, dst + at, width, first, tasks});
  }
}

void add_noise_pieces(const std::vector<Piece>& pieces, const Terms& terms, const Adam* adam) {
  // The chunks of all tensors are numbered in one row, so a list of a thousand small tensors is
  // divided as a large one is.
  std::vector<int64_t> starts;
  int64_t total = 0;
  for (const Piece& piece : pieces) {
    starts.push_back(total);
    total += chunks_of(piece);
  }
  const Isa* const isa = chosen_isa();
  at::parallel_for(0, total, grain_of(terms), [&](int64_t begin, int64_t end) {
    const FloatMode mode;
    std::vector<Seed> room;
    std::vector<Task> tasks, steps;
    Adam own = {};
    size_t t = std::upper_bound(starts.begin(), starts.end(), begin) - starts.begin() - 1;
    for (; t < pieces.size() && starts[t] < end; t++) {
      const Piece& piece = pieces[t];
      tasks = piece.tasks;
      if (tasks.empty()) continue;
      terms.set(tasks, room);
      if (adam) {
        steps = tasks;
        own = *adam;
        own.steps = steps.data();
        own.n = static_cast<int64_t>(steps.size());
        tasks.resize(1);
        tasks[0].adam = &own;
      }
      const int64_t size = tasks[0].dtype == Dtype::kFp32 ? 4 : 2;
      const int64_t from = first_chunk(piece);
      const int64_t start =
          std::max(piece.first, (from + std::max(begin - starts[t], {0})) * kChunk);
      const int64_t stop = std::min(piece.first + piece.n, (from + end - starts[t]) * kChunk);
      const int64_t block = tasks.size() == 1 ? piece.n : kBlock * kChunk;
      for (int64_t first = start; first < stop; first += block) {
        const int64_t last = std::min(stop, first + block);
        const int64_t at = (first - piece.first) * size;
        const char* const src = piece.src ? piece.src + at : nullptr;
        for (const Task& task : tasks) isa->add_noise_span(task, first, last, src, piece.dst + at);
      }
    }
  });
}

Task task_of(const char* op, const at::Tensor& y, int64_t K, bool stochastic, int64_t rounding_seed,
             int64_t stream, double keep) {
  Task task = {};
  task.K = K;
  task.dtype = dtype_of(op, y);
  task.stochastic = stochastic;
  task.rounding_hash = splitmix64(static_cast<uint64_t>(rounding_seed));
  task.stream = static_cast<uint32_t>(stream);
  task.keep = static_cast<float>(keep);
  return task;
}

const char* source_of(const char* op, const at::Tensor& x, const at::Tensor& out) {
  check_dense(op, "x", x);
  TORCH_CHECK(x.numel() == out.numel() && x.scalar_type() == out.scalar_type(), op,
              ": out must be like x, ", x.sizes(), " ", x.scalar_type(), ", got ", out.sizes(), " ",
              out.scalar_type());
  return static_cast<const char*>(x.const_data_ptr());
}

void check_found_inf(const char* op, const std::optional<at::Tensor>& found_inf) {
  if (!found_inf) return;
  check_dense(op, "found_inf", *found_inf);
  TORCH_CHECK(found_inf->scalar_type() == at::kFloat && found_inf->numel() == 1, op,
              ": found_inf must be float32 [1], got ", found_inf->scalar_type(), " ",
              found_inf->sizes());
}

// Whether the op is skipped: because of its coefficients, which sets the flag, or by the flag.
bool skips(bool by_coefs, const std::optional<at::Tensor>& found_inf) {
  if (!found_inf) return by_coefs;
  float* const found = found_inf->mutable_data_ptr<float>();
  if (by_coefs) *found = 1;
  return *found != 0;
}

void add_noise_unless_skipped(const std::vector<Piece>& pieces, const Terms& terms,
                              const std::optional<at::Tensor>& found_inf) {
  if (std::all_of(pieces.begin(), pieces.end(), [](const Piece& piece) { return piece.n == 0; }))
    return;
  if (!skips(terms.skips(0), found_inf)) return add_noise_pieces(pieces, terms);
  for (const Piece& piece : pieces) {
    const size_t n_bytes = piece.n * (piece.tasks[0].dtype == Dtype::kFp32 ? 4 : 2);
    if (!piece.src) std::memset(piece.dst, 0, n_bytes);
    if (piece.src && piece.src != piece.dst) std::memcpy(piece.dst, piece.src, n_bytes);
  }
}

}  // namespace pseuzo
