// Replay: the launches of a prepared layer as one CUDA graph, whose parameters follow x and out.
//
// Bound by the host: one launch of a graph takes it about a third of two launches of kernels.
#include <cuda_runtime.h>

#include <utility>
#include <vector>

#include "common/launch.cuh"

namespace csfast::cuda {

struct Replay::State {
  Prepared prepared;
  std::vector<cudaGraphNode_t> nodes;  // by part
  std::vector<std::byte> params;       // as `prepared` has them, with addresses
  const void* x = nullptr;             // that they are of
  void* out = nullptr;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;

  ~State() {
    if (exec != nullptr) static_cast<void>(cudaGraphExecDestroy(exec));
    if (graph != nullptr) static_cast<void>(cudaGraphDestroy(graph));
  }

  void want(cudaError_t status, const char* call) const {
    check(status, prepared.parts.front().step.op, "replay", call);
  }

  // The kernels of the graph as launches put them on a stream, which tells the node of each.
  void capture(cudaStream_t stream) {
    want(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal),
         "cudaStreamBeginCapture");
    for (const Prepared::Part& part : prepared.parts) {
      launch_step(part.step, params.data() + part.begin, stream);
      cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
      const cudaGraphNode_t* last = nullptr;
      size_t n = 0;
      want(cudaStreamGetCaptureInfo(stream, &status, nullptr, nullptr, &last, nullptr, &n),
           "cudaStreamGetCaptureInfo");
      nodes.push_back(last[n - 1]);
    }
    want(cudaStreamEndCapture(stream, &graph), "cudaStreamEndCapture");
    want(cudaGraphInstantiate(&exec, graph, 0), "cudaGraphInstantiate");
  }

  // Launches to come take x and out; those that are on their way keep theirs.
  void move_to(const void* new_x, void* new_out) {
    for (size_t i = 0; i < nodes.size(); ++i) {
      const Prepared::Part& part = prepared.parts[i];
      if (part.step.x_at < 0 && part.step.out_at < 0) continue;
      std::byte* own = params.data() + part.begin;
      copy_params(prepared, part, new_x, new_out, own);
      void* arguments[] = {own};
      cudaKernelNodeParams node{};
      node.func = const_cast<void*>(part.step.kernel);
      node.gridDim = dim3(part.step.grid[0], part.step.grid[1], part.step.grid[2]);
      node.blockDim = dim3(part.step.threads);
      node.sharedMemBytes = static_cast<unsigned>(part.step.shared_bytes);
      node.kernelParams = arguments;
      want(cudaGraphExecKernelNodeSetParams(exec, nodes[i], &node),
           "cudaGraphExecKernelNodeSetParams");
    }
    x = new_x;
    out = new_out;
  }
};

Replay::Replay(Prepared prepared) : state_(std::make_unique<State>()) {
  state_->prepared = std::move(prepared);
  state_->params = state_->prepared.params;
  cudaStream_t stream = nullptr;
  state_->want(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking),
               "cudaStreamCreateWithFlags");
  try {
    state_->capture(stream);
  } catch (const BackendError&) {
    static_cast<void>(cudaStreamDestroy(stream));
    throw;
  }
  state_->want(cudaStreamDestroy(stream), "cudaStreamDestroy");
}

Replay::Replay(Replay&&) noexcept = default;
Replay::~Replay() = default;

void Replay::run(const void* x, void* out, Stream stream) {
  State& state = *state_;
  const auto on = static_cast<cudaStream_t>(stream);
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  state.want(cudaStreamIsCapturing(on, &capture), "cudaStreamIsCapturing");
  if (capture != cudaStreamCaptureStatusNone || is_synchronous()) {
    return cuda::run(state.prepared, x, out, stream);
  }
  if (x != state.x || out != state.out) state.move_to(x, out);
  state.want(cudaGraphLaunch(state.exec, on), "cudaGraphLaunch");
}

}  // namespace csfast::cuda
