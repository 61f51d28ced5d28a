#include "vae.cuh"

namespace bf::cuda {

const char* vae_float32(const VaeArgs& args, const VaePlan& plan, Stream stream) {
  return plan.rows == 64 ? launch_vae<float, 64>(args, plan, stream) : launch_vae<float, 32>(args, plan, stream);
}

}  // namespace bf::cuda
