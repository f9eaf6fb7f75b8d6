// What a block can ask of the machine beside arithmetic, each one instruction of PTX: to let the
// next kernel begin, to wait for the one before, to load past the caches, to copy rows in bulk.
//
// Programmatic launches and bulk copies are of compute capability 9.0. Below it the first two do
// nothing, as the order of the stream does it all, and the copies must not be called.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace csfast::cuda {

// Registers of a thread in a block of 512, one a processor, that leave room beside it for a block
// of the kernel behind: of 256 threads with 48 each, which so is there already when this one ends.
inline constexpr int kOverlapRegisters = 104;
inline constexpr int kOverlapThreads = 256;
inline constexpr int kOverlapBlocks = 5;  // of these, to a processor: a bound of 48 registers

// The next kernel of the stream may begin once every block has said so or ended. It still waits,
// in wait_for_prior(), before it touches what this one writes.
__device__ __forceinline__ void launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Returns when the kernel before has ended and its writes are seen. As every kernel that is
// launched so calls this in every block, all kernels before that one have ended too.
__device__ __forceinline__ void wait_for_prior() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Brings `bytes`, a multiple of 16, from `from`, likewise, to the L2 cache. Reads nothing, so it
// may come before wait_for_prior().
__device__ __forceinline__ void prefetch(const void* from, int bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes));
#endif
}

// The line at `from` likewise.
__device__ __forceinline__ void prefetch_line(const void* from) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
}

// For what is read once: the L2 cache drops it first.
__device__ __forceinline__ uint64_t read_once() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// 16 bytes of memory that no kernel writes meanwhile, past the L1 cache. Volatile, so that loads
// stay before the barriers that they were written before.
__device__ __forceinline__ uint4 load_once(const void* from, uint64_t policy) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from), "l"(policy));
  return v;
}

// A barrier in shared memory that ends a phase when so many threads have arrived as it was
// initialised for, mostly one, and the bytes that these announced have come.
using Arrival = uint64_t;

__device__ __forceinline__ uint32_t shared_address(const void* at) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(at));
}

// By one thread, before a barrier of the block; what this thread does itself need not wait.
__device__ __forceinline__ void init_arrivals(Arrival* arrival, int n, int threads = 1) {
#if __CUDA_ARCH__ >= 900
  for (int i = 0; i < n; ++i) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(arrival + i)),
                 "r"(threads)
                 : "memory");
  }
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // the copies see them
#endif
}

// By one thread: the phase ends when `bytes` have come.
__device__ __forceinline__ void expect(Arrival* arrival, int bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(arrival)),
      "r"(bytes)
      : "memory");
#endif
}

// By each of the threads that the phase waits for, when it has done with what the phase guards.
__device__ __forceinline__ void arrive(Arrival* arrival) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(arrival))
               : "memory");
#endif
}

// `bytes`, a multiple of 16, to shared memory; both addresses likewise.
__device__ __forceinline__ void copy_bulk(void* to, const void* from, int bytes, Arrival* arrival,
                                          uint64_t policy) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1], %2, [%3], %4;" ::"r"(shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(arrival)), "l"(policy)
      : "memory");
#endif
}

// Returns when the phase of this parity has ended: the first is 0, the next 1, and so on in turns.
__device__ __forceinline__ void wait(Arrival* arrival, int parity) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(shared_address(arrival)),
      "r"(parity)
      : "memory");
#endif
}

}  // namespace csfast::cuda
