// One probe decides which kernels run; BENIFUL_ISA=scalar|avx2|avx512 forces a lower path.
#pragma once
#include "kernels.h"

namespace bf {

enum class Isa { kScalar = 0, kAvx2 = 1, kAvx512 = 2 };

const char* isa_name(Isa isa);
Isa machine_isa();   // the best that machine and build have
Isa active_isa();    // that, or what BENIFUL_ISA asks for; throws std::runtime_error if it can't be had
bool has_feature(const char* name);   // a CPU feature by its compiler name, for reports

const DistanceKernels& distance_kernels();
const LossKernels& loss_kernels();
const StatsKernels& stats_kernels();

}  // namespace bf
