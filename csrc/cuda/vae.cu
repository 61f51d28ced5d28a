// Chooses the tile for the device at hand; the kernels are in vae.cuh.
#include "vae.cuh"

namespace bf::cuda {

const char* vae_distance(const VaeArgs& args, Dtype dtype, Stream stream) {
  if (args.n == 0) return nullptr;
  int device = 0, shared = 0, processors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return failed(error);
  const VaePlan plan = plan_vae(args.n, args.hidden, args.latent, size_of(dtype), shared, processors);
  if (plan.rows == 0) return "this VAE is too large for the shared memory of this GPU";
  if (dtype == kBFloat16) return vae_bfloat16(args, plan, shared, stream);
  if (dtype == kFloat16) return vae_float16(args, plan, shared, stream);
  return vae_float32(args, plan, shared, stream);
}

}  // namespace bf::cuda
