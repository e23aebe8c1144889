// What the noise ops on the CPU were compiled for, and use; for module.cpp.
#pragma once

#include <string>
#include <vector>

namespace pseuzo {

std::string cpu_isa();                // in use: "avx512", "avx2" or "plain"; PSEUZO_CPU_ISA chooses
std::vector<std::string> cpu_isas();  // compiled in
std::vector<std::string> cpu_noises();      // implemented: others run in plain torch
void set_cpu_isa(const std::string& name);  // for tests

}  // namespace pseuzo
