// Products of small matrices on the tensor cores, one instruction each. All lanes of a warp call.
//
// Where the operands of C = A B + C lie, of lane 4 g + t:
//
//   C (16, 8)   c[0], c[1]: row g, columns 2 t, 2 t + 1       c[2], c[3]: row g + 8, the same
//   A (16, k)   a[0], a[2]: row g, the first and second half of k         a[1], a[3]: row g + 8
//   B (k, 8)    b[0], b[1]: column g, the first and second half of k
//
// A register of A or B holds 4 bytes: four neighbouring bytes or two numbers, or one, from place 4
// t, 2 t or t of its half on. Whoever permutes k the same way in A and in B gets the same C.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace csfast::cuda {

// k = 32: unsigned bytes times signed bytes, exactly in int32.
__device__ __forceinline__ void multiply_bytes(int (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                               uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace csfast::cuda
