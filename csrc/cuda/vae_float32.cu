#include "vae.cuh"

namespace bf::cuda {

const char* vae_float32(const VaeArgs& args, const VaePlan& plan, int most_shared, Stream stream) {
  return plan.rows == 64 ? launch_vae<float, 64>(args, plan, most_shared, stream) : launch_vae<float, 32>(args, plan, most_shared, stream);
}

}  // namespace bf::cuda
