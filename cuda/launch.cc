#include "common/launch.cuh"

#include <cuda_runtime.h>

#include <cstdlib>
#include <cstring>
#include <string_view>

#include "common/device.cuh"

namespace csfast::cuda {

bool is_synchronous() {
  static const bool asked = [] {
    const char* value = std::getenv("CSFAST_SYNC");
    return value != nullptr && std::string_view(value) == "1";
  }();
  return asked;
}

namespace {

void wait_for(const Step& step, cudaStream_t stream) {
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream, &capture), step.op, step.name, "cudaStreamIsCapturing");
  if (capture != cudaStreamCaptureStatusNone) return;
  check(cudaStreamSynchronize(stream), step.op, step.name, "run");
}

}  // namespace

void launch_step(const Step& step, void* params, Stream stream) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(step.grid[0], step.grid[1], step.grid[2]);
  config.blockDim = dim3(step.threads);
  config.dynamicSmemBytes = static_cast<size_t>(step.shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = step.overlaps ? 1 : 0;
  void* arguments[] = {params};
  check(cudaLaunchKernelExC(&config, step.kernel, arguments), step.op, step.name, "launch");
  if (is_synchronous()) wait_for(step, config.stream);
}

namespace {

// Loads the kernel, and lets a block of it have as much shared memory as the machine gives one, if
// it wants more than it has unasked: always the same, so that it does not matter who asks first.
void make_ready(const Step& step) {
  cudaFuncAttributes attributes{};
  check(cudaFuncGetAttributes(&attributes, step.kernel), step.op, step.name,
        "cudaFuncGetAttributes");
  if (step.shared_bytes <= attributes.maxDynamicSharedSizeBytes) return;
  const int most = chip(step.op).shared_bytes - static_cast<int>(attributes.sharedSizeBytes);
  check(cudaFuncSetAttribute(step.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most),
        step.op, step.name, "cudaFuncSetAttribute");
}

}  // namespace

void Queue::put(const Step& step, const void* params, size_t bytes) const {
  if (prepared != nullptr || step.shared_bytes > kSharedUnasked) make_ready(step);
  if (prepared == nullptr) return launch_step(step, const_cast<void*>(params), stream);
  const size_t begin = prepared->params.size();
  prepared->parts.push_back({.step = step, .begin = begin, .bytes = bytes});
  prepared->params.resize(begin + bytes);
  std::memcpy(prepared->params.data() + begin, params, bytes);
}

void copy_params(const Prepared& prepared, const Prepared::Part& part, const void* x, void* out,
                 std::byte* to) {
  std::memcpy(to, prepared.params.data() + part.begin, part.bytes);
  const auto move = [&](int at, const void* by) {
    if (at < 0) return;
    uintptr_t address;
    std::memcpy(&address, to + at, sizeof address);
    address += reinterpret_cast<uintptr_t>(by);
    std::memcpy(to + at, &address, sizeof address);
  };
  move(part.step.x_at, x);
  move(part.step.out_at, out);
}

void run(const Prepared& prepared, const void* x, void* out, Stream stream) {
  alignas(16) std::byte params[kParamsMax];
  for (const Prepared::Part& part : prepared.parts) {
    copy_params(prepared, part, x, out, params);
    launch_step(part.step, params, stream);
  }
}

}  // namespace csfast::cuda
