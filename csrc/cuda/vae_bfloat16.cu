#include "vae.cuh"

namespace bf::cuda {

const char* vae_bfloat16(const VaeArgs& args, const VaePlan& plan, int most_shared, Stream stream) {
  return plan.rows == 128 ? launch_vae<bfloat16, 128>(args, plan, most_shared, stream) : launch_vae<bfloat16, 64>(args, plan, most_shared, stream);
}

}  // namespace bf::cuda
