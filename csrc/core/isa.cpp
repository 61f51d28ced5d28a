#include "isa.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace bf {

const char* isa_name(Isa isa) {
  static const char* const names[] = {"scalar", "avx2", "avx512"};
  return names[static_cast<int>(isa)];
}

bool has_feature(const char* name) {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_cpu_init();
#define BF_PROBE(feature) \
  if (!std::strcmp(name, feature)) return __builtin_cpu_supports(feature) != 0;
  BF_PROBE("sse4.2")
  BF_PROBE("avx")
  BF_PROBE("avx2")
  BF_PROBE("fma")
  BF_PROBE("f16c")
  BF_PROBE("avx512f")
  BF_PROBE("avx512bw")
  BF_PROBE("avx512dq")
  BF_PROBE("avx512vl")
#undef BF_PROBE
#endif
  (void)name;
  return false;
}

Isa machine_isa() {
#ifdef BF_X86
  if (has_feature("avx2") && has_feature("fma") && has_feature("f16c")) {
    bool wide = has_feature("avx512f") && has_feature("avx512bw") && has_feature("avx512dq") && has_feature("avx512vl");
    return wide ? Isa::kAvx512 : Isa::kAvx2;
  }
#endif
  return Isa::kScalar;
}

static Isa choose() {
  Isa best = machine_isa();
  const char* word = std::getenv("BENIFUL_ISA");
  if (!word || !*word) return best;
  for (Isa isa : {Isa::kScalar, Isa::kAvx2, Isa::kAvx512}) {
    if (std::strcmp(word, isa_name(isa))) continue;
    if (isa > best) throw std::runtime_error(std::string("BENIFUL_ISA=") + word + " asks for more than this machine and build have (" + isa_name(best) + ")");
    return isa;
  }
  throw std::runtime_error(std::string("BENIFUL_ISA=") + word + " is unknown; it takes scalar, avx2 or avx512");
}

Isa active_isa() {
  // Not initialised when choose() throws, so every call says again what is wrong.
  static const Isa isa = choose();
  return isa;
}

#ifdef BF_X86
#define BF_PICK(family) \
  switch (active_isa()) { \
    case Isa::kAvx512: return family##_avx512; \
    case Isa::kAvx2: return family##_avx2; \
    default: return family##_scalar; \
  }
#else
#define BF_PICK(family) \
  active_isa(); \
  return family##_scalar;
#endif

const DistanceKernels& distance_kernels() { BF_PICK(distance) }
const LossKernels& loss_kernels() { BF_PICK(loss) }
const StatsKernels& stats_kernels() { BF_PICK(stats) }

}  // namespace bf
