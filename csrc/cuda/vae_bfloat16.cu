#include "vae.cuh"

namespace bf::cuda {

const char* vae_bfloat16(const VaeArgs& args, const VaePlan& plan, Stream stream) {
  return plan.rows == 128 ? launch_vae<bfloat16, 128>(args, plan, stream) : launch_vae<bfloat16, 64>(args, plan, stream);
}

}  // namespace bf::cuda
