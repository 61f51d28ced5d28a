#include "vae.cuh"

namespace bf::cuda {

const char* vae_float16(const VaeArgs& args, const VaePlan& plan, int most_shared, Stream stream) {
  return plan.rows == 128 ? launch_vae<float16, 128>(args, plan, most_shared, stream) : launch_vae<float16, 64>(args, plan, most_shared, stream);
}

}  // namespace bf::cuda
