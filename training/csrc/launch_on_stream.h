// Launches the body of a kernel on the current CUDA stream of a tensor's device.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "check.h"
#include "launch.h"

// Declared by torch only with the headers of its CUDA build.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace tensorar {

inline bool is_aligned(const torch::stable::Tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.data_ptr()) % sizeof(Pair) == 0;
}

// What a block may have at most; beyond 48 KiB a kernel has to be told.
template <class Body, class Arguments>
void allow_shared_memory(int64_t bytes, int device) {
  int limit = 0;
  const cudaError_t asked = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  check(asked == cudaSuccess, "launch: ", cudaGetErrorString(asked));
  check(bytes <= limit, "launch: a block must need at most the ", limit, " bytes of shared memory that the device has, got ",
        bytes, "; lower window_size or model_dim, or set engine.ops: reference");
  if (bytes <= 48 << 10) return;
  const cudaError_t error = cudaFuncSetAttribute(run_on_grid<Body, Arguments>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                 static_cast<int>(bytes));
  check(error == cudaSuccess, "launch: ", cudaGetErrorString(error));
}

template <class Body, class Arguments>
void launch_on_stream(const Arguments& arguments, const torch::stable::Tensor& on) {
  const int64_t num_blocks = Body::num_blocks(arguments);
  if (num_blocks == 0) return;
  check(num_blocks < int64_t{1} << 31, "launch: a grid must have fewer than 2**31 blocks, got ", num_blocks);
  const torch::stable::accelerator::DeviceGuard guard(on.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(on.get_device_index(), &stream));
  const int64_t shared_bytes = Body::shared_pairs(arguments) * int64_t{sizeof(Pair)};
  allow_shared_memory<Body, Arguments>(shared_bytes, on.get_device_index());
  run_on_grid<Body><<<num_blocks, Body::THREADS, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments);
  const cudaError_t error = cudaGetLastError();
  check(error == cudaSuccess, "launch: ", cudaGetErrorString(error));
}

struct OnStream {
  template <class Body, class Arguments>
  void run(const Arguments& arguments, const torch::stable::Tensor& on) const {
    launch_on_stream<Body>(arguments, on);
  }
};

}  // namespace tensorar
