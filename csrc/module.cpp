// The Python module pseuzo_kernels._C. Importing it registers the ops of the other files; it says
// how they were built.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#ifdef PSEUZO_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

#include <string>

#include "noise/isa.h"
#include "noise/noise.h"

namespace pseuzo {
namespace {

pybind11::dict build_info() {
  pybind11::dict info;
#ifdef PSEUZO_WITH_CUDA
  info["cuda"] =
      std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
#else
  info["cuda"] = pybind11::none();
#endif
  info["isas"] = cpu_isas();
  info["noises"] = cpu_noises();
  info["rounding_version"] = kRoundingVersion;
  return info;
}

}  // namespace
}  // namespace pseuzo

PYBIND11_MODULE(_C, m) {
  m.doc() = "C++ and CUDA implementations of the pseuzo ops";
  m.def("cpu_isa", &pseuzo::cpu_isa,
        "The instruction set in use; the environment variable PSEUZO_CPU_ISA chooses.");
  m.def("build_info", &pseuzo::build_info,
        "cuda (version or None), isas (compiled in), noises, rounding_version.");
  m.def("_set_cpu_isa", &pseuzo::set_cpu_isa, "Change the instruction set, for tests.");
}
