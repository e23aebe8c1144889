// Which instruction set the noise ops use on the CPU, for module.cpp.
#pragma once

#include <string>
#include <vector>

namespace pseuzo {

std::string cpu_isa();                      // in use: "avx512", "avx2" or "plain"; PSEUZO_CPU_ISA chooses
std::vector<std::string> cpu_isas();        // compiled in
void set_cpu_isa(const std::string& name);  // for tests

}  // namespace pseuzo
