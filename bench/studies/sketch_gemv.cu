// The sketch on a GPU: how fast can one row go through the linears of a layer, read as trellis
// codes? A study of one chip (sm_90a), not a kernel of the library.
//
//   nvcc -O3 -std=c++20 -gencode=arch=compute_90a,code=sm_90a bench/studies/sketch_gemv.cu -o gemv
//   ./gemv [--host] [--runs N] [--json FILE]
//   python bench/studies/sketch_gemv.py --record gemv.json --json both.json   (the chain in torch)
//
// The chain is qkv (6144, 4096), o (4096, 4096), gate_up (28672, 4096), down (4096, 14336) of eight
// layers of random codes, so that no cache holds them; every matrix reads the first outputs of the
// one before. A measurement is one replay of a CUDA graph with all 32 of them, variants take turns.
// Included: rotation and int8 quantisation of every input, by each block for itself. Its
// permutation and signs are taken by whoever writes the input: the matrix before. Outputs are
// bfloat16, compared with textbook parities on the host from the packed format, bit for bit.
// `--host` compares the decoding functions alone, without a GPU. Not handled: NaN, columns off
// multiples of 1024.
//
// Format: z1 and z0 of a weight are parities of the newest nine u's of its column and row mod 16,
// which is one sequence along steps t = row / 16; index = 4 raw + 2 z1 + z0; value = table[index],
// any table. Codes are turned once, as a permutation of their bits: a word has one bit plane of 32
// columns at one step, so that a plane of z for 32 weights is the xor of five words that a thread
// has in registers. The bit of column 16 half + 4 j + c (c < 4) is bit j of nibble 4 half + c. A
// transpose inside of nibbles then gives four words of indices, and PRMT looks four of them up in
// eight bytes: bit 3 of a selector replicates a sign, which is 0 for table + 64, so sums over two
// (four) tables of eight need no select.
//
// A warp takes 4 steps of 1024 columns at a time from its own ring in shared memory, each thread
// what it copied there itself. The ring is filled over the ends of matrices: codes wait for no
// activation.
//   chain:    a kernel a matrix, each started while the one before runs (programmatic launch)
//   resident: one kernel for all, blocks wait for each other between matrices
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace {

constexpr int kLayers = 8;
constexpr int kMatrices = 4;
constexpr int kPhases = kLayers * kMatrices;
constexpr int kLanes = 16;    // sequences of a column: rows mod 16
constexpr int kColumns = 32;  // of a thread
constexpr int kGroup = 1024;  // columns of a warp
constexpr int kSteps = 4;     // of a piece
constexpr int kMemory = 8;    // u's before the newest that count
constexpr int kBlock = 128;   // of the rotation
constexpr int kMostColumns = 14336;
constexpr int kMostRows = 256;                        // of a block
constexpr float kInverseSqrt = 0.08838834764831845f;  // 1 / sqrt(kBlock)
constexpr unsigned kPart1 = 0515, kPart0 = 0362;      // delays of z1 and of z0, bit i for delay i

struct Shape {
  const char* name;
  int rows;
  int cols;
};
constexpr Shape kShapes[kMatrices] = {
    {"qkv", 6144, 4096}, {"o", 4096, 4096}, {"gate_up", 28672, 4096}, {"down", 4096, 14336}};

void want(cudaError_t status, const char* call) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string("[sketch_gemv] ") + call +
                           " failed: " + cudaGetErrorString(status) + ".");
}

// Tables

constexpr int kUpper16[8] = {3, 8, 14, 20, 27, 35, 46, 63};  // fitted to a normal distribution
// Symmetric; those of 8 and 32 levels are made up, the kernels take any values in [-63, 63].
std::vector<int> table_of(int bits) {
  const int size = 2 << bits;
  std::vector<int> table(static_cast<size_t>(size));
  for (int i = 0; i < size / 2; ++i) {
    const int value = bits == 3   ? kUpper16[i]
                      : bits == 2 ? (const int[]){6, 19, 35, 60}[i]
                                  : 2 + (61 * i * (i + 30)) / (15 * 45);
    table[static_cast<size_t>(size / 2 + i)] = value;
    table[static_cast<size_t>(size / 2 - 1 - i)] = -value;
  }
  return table;
}

// Four entries a word, + 64. `plain` is indexed by 4 raw + pair, `swapped` by 4 pair + raw, both by
// the third bit of raw above that. Of 16 entries the upper eight stand in reverse, for ~index.
struct Tables {
  uint32_t plain[8];
  uint32_t swapped[8];
  uint32_t minus;  // 2^32 - 1, which the compiler does not know
};

Tables words_of(const std::vector<int>& table) {
  Tables tables{};
  tables.minus = 0xffffffff;
  for (size_t i = 0; i < table.size(); ++i) {
    const auto put = [&](uint32_t (&words)[8], size_t at) {
      if (table.size() == 16 && at >= 8) at = 23 - at;
      words[at / 4] |= static_cast<uint32_t>(table[i] + 64) << 8 * (at % 4);
    };
    put(tables.plain, i);
    put(tables.swapped, (i & ~size_t{15}) | (i & 3) << 2 | (i & 12) >> 2);
  }
  return tables;
}

// Packed format

struct Packed {
  const uint8_t* codes;  // (rows / 128, cols / 4, bits, 64)
  int rows;
  int cols;
  int bits;
};

__host__ __device__ inline const uint8_t* byte_of(const Packed& p, int row, int col) {
  const int64_t tile = int64_t{row / 128} * (p.cols / 4) + col / 4;
  return p.codes + tile * p.bits * 64 + 4 * (row % 16) + col % 4;
}

__host__ __device__ inline uint32_t u_of(const Packed& p, int row, int col) {
  return byte_of(p, row, col)[0] >> (row % 128 / 16) & 1;
}

__host__ __device__ inline uint32_t raw_of(const Packed& p, int row, int col) {
  const uint8_t* byte = byte_of(p, row, col);
  const int step = row % 128 / 16;
  if (p.bits == 2) return byte[64] >> (0x54107632u >> 4 * step & 15) & 1;
  const uint32_t low = byte[64 * (1 + step / 4)] >> 2 * (step % 4) & 3;
  return p.bits == 3 ? low : low | (byte[192] >> step & 1) << 2;
}

// Turned: (lane, group of columns, piece of steps, plane, thread, step) words.
__host__ __device__ inline uint32_t turned_word(const Packed& p, int64_t at) {
  const int pieces = p.rows / (kLanes * kSteps);
  const int step = static_cast<int>(at % kSteps);
  const int thread = static_cast<int>(at / kSteps % 32);
  const int plane = static_cast<int>(at / (kSteps * 32) % p.bits);
  at /= kSteps * 32 * p.bits;
  const int piece = static_cast<int>(at % pieces);
  const int group = static_cast<int>(at / pieces % (p.cols / kGroup));
  const int lane = static_cast<int>(at / pieces / (p.cols / kGroup));
  const int row = lane + kLanes * (kSteps * piece + step);
  uint32_t word = 0;
  for (int bit = 0; bit < 32; ++bit) {
    const int nibble = bit / 4, place = bit % 4;
    const auto col = [&](int j) {
      return group * kGroup + thread * kColumns + 16 * (nibble / 4) + 4 * j + nibble % 4;
    };
    uint32_t value;
    if (plane == 0) {
      value = u_of(p, row, col(place));
    } else if (p.bits == 2) {
      value = raw_of(p, row, col((place + 2) % 4));  // j = 2, 3, 0, 1
    } else if (plane == 3) {
      value = raw_of(p, row, col(place)) >> 2;
    } else {  // j = 2, 0 in plane 1, j = 3, 1 in plane 2
      value = raw_of(p, row, col(place / 2 == 0 ? plane + 1 : plane - 1)) >> place % 2 & 1;
    }
    word |= value << bit;
  }
  return word;
}

// Decoding

// Bytes of (low, high) by nibbles of a selector; bit 3 of a nibble replicates the byte's sign.
__host__ __device__ inline uint32_t permute(uint32_t low, uint32_t high, uint32_t selector) {
#ifdef __CUDA_ARCH__
  uint32_t out;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(out) : "r"(low), "r"(high), "r"(selector));
  return out;
#else
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t nibble = selector >> 4 * i & 15;
    const uint32_t byte = ((nibble & 4 ? high : low) >> 8 * (nibble & 3)) & 255;
    out |= (nibble & 8 ? (byte >> 7) * 255 : byte) << 8 * i;
  }
  return out;
#endif
}

// Sum of four products of unsigned and signed bytes.
__host__ __device__ inline int dot(uint32_t weights, uint32_t x, int sum) {
#ifdef __CUDA_ARCH__
  int out;
  asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(out) : "r"(weights), "r"(x), "r"(sum));
  return out;
#else
  for (int i = 0; i < 4; ++i) {
    sum += static_cast<int>(weights >> 8 * i & 255) * static_cast<int8_t>(x >> 8 * i & 255);
  }
  return sum;
#endif
}

// Any function of three bits, by its table.
template <int kTable>
__host__ __device__ inline uint32_t logic(uint32_t a, uint32_t b, uint32_t c) {
#ifdef __CUDA_ARCH__
  uint32_t out;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(out) : "r"(a), "r"(b), "r"(c), "n"(kTable));
  return out;
#else
  uint32_t out = 0;
  for (int i = 0; i < 32; ++i) {
    const uint32_t at = (a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1);
    out |= (static_cast<uint32_t>(kTable) >> at & 1) << i;
  }
  return out;
#endif
}

__host__ __device__ inline uint32_t merge(uint32_t mask, uint32_t there, uint32_t elsewhere) {
  return logic<0xca>(mask, there, elsewhere);
}

// One step: sum += (value + 64) * x over 32 columns. `u` are the newest nine, u[8] of this step.
// Logic, shifts and PRMT share a pipe, so what can be a product is one: -1 - index turns a
// selector.
template <int kBits>
__host__ __device__ __forceinline__ int step_sum(const uint32_t* u, const uint32_t (&raw)[3],
                                                 const Tables& tables, const uint32_t (&x)[8],
                                                 int sum) {
  constexpr uint32_t kOdd = 0x55555555, kPair = 0x33333333, kTop = 0x88888888;
  const uint32_t z1 = u[8] ^ u[6] ^ u[5] ^ u[2] ^ u[0];
  const uint32_t z0 = u[7] ^ u[4] ^ u[3] ^ u[2] ^ u[1];
  const uint32_t pair[2] = {merge(kOdd, z0, z1 << 1),   // of j = 0 and 2
                            merge(kOdd, z0 >> 1, z1)};  // of j = 1 and 3
  for (int j = 0; j < 4; ++j) {
    if constexpr (kBits == 2) {
      const uint32_t low = j < 2 ? pair[j] : pair[j - 2] >> 2;
      const uint32_t bit = j == 0   ? raw[0]
                           : j == 1 ? raw[0] >> 1
                           : j == 2 ? raw[0] << 2
                                    : raw[0] << 1;
      const uint32_t index = logic<0xea>(low, kPair, bit & 0x44444444);
      sum = dot(permute(tables.plain[0], tables.plain[1], index), x[j], sum);
      sum = dot(permute(tables.plain[0], tables.plain[1], index >> 16), x[4 + j], sum);
    } else {
      const uint32_t (&t)[8] = j < 2 ? tables.plain : tables.swapped;
      const uint32_t index =
          j < 2 ? merge(kPair, pair[j], raw[j]) : merge(kPair, raw[j - 2], pair[j - 2]);
      if constexpr (kBits == 3) {
        const uint32_t high = index >> 16;
        sum = dot(permute(t[0], t[1], index), x[j], sum);
        sum = dot(permute(t[2], t[3], index * tables.minus + tables.minus), x[j], sum);
        sum = dot(permute(t[0], t[1], high), x[4 + j], sum);
        sum = dot(permute(t[2], t[3], high * tables.minus + tables.minus), x[4 + j], sum);
      } else {
        const uint32_t third = raw[2] << (3 - j);
        const uint32_t quarter[4] = {
            // bit 3 of a nibble: another quarter of the table
            logic<0xec>(kTop, index, third), logic<0xbc>(kTop, index, third),
            logic<0xdc>(kTop, index, third), logic<0x7c>(kTop, index, third)};
        for (int k = 0; k < 4; ++k) {
          sum = dot(permute(t[2 * k], t[2 * k + 1], quarter[k]), x[j], sum);
          sum = dot(permute(t[2 * k], t[2 * k + 1], quarter[k] >> 16), x[4 + j], sum);
        }
      }
    }
  }
  return sum;
}

// The kernel

struct Matrix {
  const uint4* codes;      // turned
  const float* step;       // (rows)
  const uint32_t* place;   // (rows): where an output goes; bit 31: negated
  const __nv_bfloat16* x;  // (cols), permuted, with signs
  __nv_bfloat16* y;        // (rows)
  int rows;
  int cols;
};

struct Params {
  Matrix matrices[kPhases];
  Tables tables;
  int first;
  int last;
  unsigned* arrived;  // blocks, over all matrices; not read in a chain
};

// What a kernel leaves out, to place its time: waiting, decoding, or all but a few codes to read.
enum class Kind { kAll, kNoWait, kLoads, kArithmetic };

template <int kBits, int kWarps, int kSlots>
struct Shared {
  uint4 ring[kWarps][kSlots][kBits][32];
  int8_t q[kMostColumns];
  int sums[kMostRows];
  float peaks[kWarps];
  int totals[kWarps];
};

// Pieces of a warp in their order: of the quads of steps of a block, group by group of columns.
struct Walk {
  int first, quads;  // of the block, counted over all lanes
  int left;          // pieces of the warp that are still to come
  int group, quad;   // now
  int sequence, piece;
  int first_sequence, first_piece;
  int pieces, groups;

  __device__ Walk(const Matrix& m, int warp, int warps) {
    pieces = m.rows / (kLanes * kSteps);
    groups = m.cols / kGroup;
    const int all = m.rows / kSteps;
    const int blocks = static_cast<int>(gridDim.x), block = static_cast<int>(blockIdx.x);
    first = all * block / blocks;
    quads = all * (block + 1) / blocks - first;
    const int at = quads * groups * warp / warps;
    left = quads * groups * (warp + 1) / warps - at;
    group = at / quads;
    quad = at - group * quads;
    first_sequence = first / pieces;
    first_piece = first - first_sequence * pieces;
    sequence = (first + quad) / pieces;
    piece = first + quad - sequence * pieces;
  }
  // Whether the next piece begins another sequence.
  __device__ __forceinline__ bool advance() {
    --left;
    ++piece;
    if (++quad == quads) {
      quad = 0;
      ++group;
      sequence = first_sequence;
      piece = first_piece;
      return true;
    }
    if (piece < pieces) return false;
    piece = 0;
    ++sequence;
    return true;
  }
};

__device__ __forceinline__ void copy16(void* to, const void* from, bool there) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from),
               "r"(there ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

template <int kPending>
__device__ __forceinline__ void arrive() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Orders what the ring takes next: the u's before a sequence's first piece, or a piece.
template <int kBits, int kWarps, int kSlots, Kind kKind>
struct Feed {
  const Params& p;
  Shared<kBits, kWarps, kSlots>& shared;
  int warp, thread;
  int matrix;
  Walk walk;
  const uint4* from = nullptr;  // of the thread in the next piece
  bool begins = true;
  int slot = 0;

  __device__ Feed(const Params& p, Shared<kBits, kWarps, kSlots>& shared, int warp, int thread)
      : p(p),
        shared(shared),
        warp(warp),
        thread(thread),
        matrix(p.first),
        walk(p.matrices[p.first], warp, kWarps) {
    skip();
  }
  __device__ void skip() {
    while (walk.left == 0 && ++matrix < p.last) {
      walk = Walk(p.matrices[matrix], warp, kWarps);
      begins = true;
    }
  }
  __device__ __forceinline__ void order() {
    constexpr int kPiece = kBits * 32;
    if (matrix < p.last) {
      if (begins) {
        const Matrix& m = p.matrices[matrix];
        const int64_t sequence = int64_t{walk.sequence} * walk.groups + walk.group;
        const int64_t at = kKind == Kind::kArithmetic ? int64_t{blockIdx.x} * kWarps + warp + 2
                                                      : sequence * walk.pieces + walk.piece;
        from = m.codes + at * kPiece + thread;
        const bool older = walk.piece >= 2, old = walk.piece >= 1;
        copy16(&shared.ring[warp][slot][0][thread], older ? from - 2 * kPiece : m.codes, older);
        copy16(&shared.ring[warp][slot][1][thread], old ? from - kPiece : m.codes, old);
        begins = false;
      } else {
#pragma unroll
        for (int plane = 0; plane < kBits; ++plane) {
          copy16(&shared.ring[warp][slot][plane][thread], from + plane * 32, true);
        }
        if (kKind != Kind::kArithmetic) from += kPiece;
        begins = walk.advance();
        if (walk.left == 0) skip();
      }
    }
    commit();  // an empty group counts, too
    if (++slot == kSlots) slot = 0;
  }
};

__device__ __forceinline__ void butterfly(float& a, float& b) {
  const float sum = a + b;
  b = a - b;
  a = sum;
}

struct Scale {
  float output;
  int total;  // of all q
};

// Rotates and quantises x to shared memory.
template <int kWarps, typename S>
__device__ __forceinline__ Scale quantise(const Matrix& m, S& shared) {
  constexpr int kThreads = 32 * kWarps, kRun = 8;  // values of a thread, 16 bytes
  constexpr int kRounds = (kMostColumns + kThreads * kRun - 1) / (kThreads * kRun);
  const int tid = static_cast<int>(threadIdx.x);
  float v[kRounds][kRun];
  uint4 loaded[kRounds];
#pragma unroll
  for (int r = 0; r < kRounds; ++r) {
    const int at = (r * kThreads + tid) * kRun;
    if (at < m.cols) loaded[r] = __ldcg(reinterpret_cast<const uint4*>(m.x + at));  // whole warps
  }
  float peak = 0;
#pragma unroll
  for (int r = 0; r < kRounds; ++r) {
    const int at = (r * kThreads + tid) * kRun;
    if (at < m.cols) {
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        const uint4& part = loaded[r];
        const uint32_t word = i / 2 == 0   ? part.x
                              : i / 2 == 1 ? part.y
                              : i / 2 == 2 ? part.z
                                           : part.w;
        v[r][i] = __uint_as_float(i % 2 == 0 ? word << 16 : word & 0xffff0000);
      }
#pragma unroll
      for (int stride = 1; stride < kRun; stride *= 2) {
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
          if ((i & stride) == 0) butterfly(v[r][i], v[r][i + stride]);
        }
      }
#pragma unroll
      for (int lane = 1; lane < kBlock / kRun; lane *= 2) {
        const float sign = tid & lane ? -1.0f : 1.0f;  // exact
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
          v[r][i] = fmaf(sign, v[r][i], __shfl_xor_sync(0xffffffff, v[r][i], lane));
        }
      }
#pragma unroll
      for (int i = 0; i < kRun; ++i) peak = fmaxf(peak, fabsf(v[r][i]));
    }
  }
  const int warp = tid / 32;
  peak = __uint_as_float(__reduce_max_sync(0xffffffff, __float_as_uint(peak)));
  if (tid % 32 == 0) shared.peaks[warp] = peak;
  __syncthreads();  // peaks; sums are zero
  peak = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) peak = fmaxf(peak, shared.peaks[w]);
  const float to_q = peak > 0 ? __fdiv_rn(127.0f, peak) : 0.0f;
  int total = 0;
#pragma unroll
  for (int r = 0; r < kRounds; ++r) {
    const int at = (r * kThreads + tid) * kRun;
    if (at < m.cols) {
      uint32_t bytes[kRun];  // the lowest of each: adding 1.5 * 2^23 rounds to even
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        bytes[i] = __float_as_uint(__fadd_rn(__fmul_rn(v[r][i], to_q), 12582912.0f));
      }
      const auto four = [&](int i) {
        return permute(permute(bytes[i], bytes[i + 1], 0x0040),
                       permute(bytes[i + 2], bytes[i + 3], 0x0040), 0x5410);
      };
      const uint2 words = make_uint2(four(0), four(4));
      total = __dp4a(static_cast<int>(words.x), 0x01010101, total);
      total = __dp4a(static_cast<int>(words.y), 0x01010101, total);
      *reinterpret_cast<uint2*>(shared.q + at) = words;
    }
  }
  total = __reduce_add_sync(0xffffffff, total);
  if (tid % 32 == 0) shared.totals[warp] = total;
  __syncthreads();  // q and totals
  total = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) total += shared.totals[w];
  return {__fmul_rn(__fdiv_rn(peak, 127.0f), kInverseSqrt), total};
}

template <int kBits, int kWarps, int kSlots, bool kResident, Kind kKind>
__global__ void __launch_bounds__(32 * kWarps, kResident || kWarps > 8 ? 1 : 2)
    gemv_kernel(const __grid_constant__ Params p) {
  extern __shared__ __align__(16) unsigned char memory[];
  auto& shared = *reinterpret_cast<Shared<kBits, kWarps, kSlots>*>(memory);
  const int tid = static_cast<int>(threadIdx.x), warp = tid / 32, thread = tid % 32;

  Feed<kBits, kWarps, kSlots, kKind> feed(p, shared, warp, thread);
  if (!kResident) asm volatile("griddepcontrol.launch_dependents;");
  for (int i = 0; i < kSlots - 1; ++i) feed.order();

  int slot = 0;
  const auto next = [&] {  // the oldest entry has come, and what was used last takes another
    arrive<kSlots - 2>();
    const int now = slot;
    if (++slot == kSlots) slot = 0;
    return now;
  };

  for (int matrix = p.first; matrix < p.last; ++matrix) {
    const Matrix& m = p.matrices[matrix];
    Walk walk(m, warp, kWarps);

    // A thread's row
    const int row = [&] {
      const int quad = walk.first + tid / kSteps;
      return quad / walk.pieces + kLanes * (kSteps * (quad % walk.pieces) + tid % kSteps);
    }();
    const bool has_row = tid < walk.quads * kSteps;
    const float step = has_row ? m.step[row] : 0.0f;
    const uint32_t place = has_row ? m.place[row] : 0;
    if (tid < kMostRows) shared.sums[tid] = 0;

    // Wait for x
    if (!kResident) {
      asm volatile("griddepcontrol.wait;" ::: "memory");
    } else if (matrix > p.first && kKind != Kind::kNoWait) {
      if (tid == 0) {
        const unsigned all = gridDim.x * static_cast<unsigned>(matrix - p.first);
        unsigned count;
        do {
          asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
                       : "=r"(count)
                       : "l"(p.arrived)
                       : "memory");
        } while (count < all);
      }
      __syncthreads();  // x is there
    }
    const Scale scale = quantise<kWarps>(m, shared);

    // Multiply
    uint32_t u[kMemory + kSteps] = {};
    uint32_t x[8] = {};
    bool begins = true;
    int group = -1;
    while (walk.left > 0) {
      if (begins) {
        const int now = next();
        const uint4 older = shared.ring[warp][now][0][thread],
                    old = shared.ring[warp][now][1][thread];
        feed.order();
        u[0] = older.x, u[1] = older.y, u[2] = older.z, u[3] = older.w;
        u[4] = old.x, u[5] = old.y, u[6] = old.z, u[7] = old.w;
        if (walk.group != group) {
          group = walk.group;
          const auto* q =
              reinterpret_cast<const uint4*>(shared.q + group * kGroup + thread * kColumns);
          const uint4 low = q[0], high = q[1];
          x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
          x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
        }
      }
      const int now = next();
      uint4 planes[kBits];
#pragma unroll
      for (int plane = 0; plane < kBits; ++plane) {
        planes[plane] = shared.ring[warp][now][plane][thread];
      }
      feed.order();
      u[8] = planes[0].x, u[9] = planes[0].y, u[10] = planes[0].z, u[11] = planes[0].w;
      int mine = 0;
      if constexpr (kKind == Kind::kLoads) {
        uint32_t mixed = 0;
#pragma unroll
        for (int plane = 0; plane < kBits; ++plane) {
          mixed ^= planes[plane].x ^ planes[plane].y ^ planes[plane].z ^ planes[plane].w;
        }
        mine = static_cast<int>(mixed & 1);
      } else {
        int sums[kSteps];
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
          uint32_t raw[3] = {};
#pragma unroll
          for (int plane = 1; plane < kBits; ++plane) {
            const uint4& w = planes[plane];
            raw[plane - 1] = s == 0 ? w.x : s == 1 ? w.y : s == 2 ? w.z : w.w;
          }
          sums[s] = step_sum<kBits>(u + s, raw, p.tables, x, 0);
        }
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
          const int sum = __reduce_add_sync(0xffffffff, sums[s]);
          if (thread == s) mine = sum;
        }
      }
      if (thread < kSteps) {
        const unsigned address = static_cast<unsigned>(
            __cvta_generic_to_shared(&shared.sums[walk.quad * kSteps + thread]));
        asm volatile("red.shared.add.s32 [%0], %1;" ::"r"(address), "r"(mine) : "memory");
      }
#pragma unroll
      for (int i = 0; i < kMemory; ++i) u[i] = u[i + kSteps];
      begins = walk.advance();
    }
    __syncthreads();  // sums are complete

    // Write
    if (has_row) {
      const float sum = static_cast<float>(shared.sums[tid] - 64 * scale.total);
      const float out = __fmul_rn(__fmul_rn(sum, step), scale.output);
      m.y[place & 0x7fffffff] = __float2bfloat16_rn(place >> 31 ? -out : out);
    }
    if (kResident && matrix + 1 < p.last && kKind != Kind::kNoWait) {
      __syncthreads();  // all of the block's outputs
      if (tid == 0) {
        asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(p.arrived) : "memory");
      }
    }
  }
}

// Other kernels

__global__ void __launch_bounds__(512) bits_kernel(uint64_t* out, int64_t words, uint64_t seed) {
  const int64_t stride = int64_t{gridDim.x} * 512;
  for (int64_t i = int64_t{blockIdx.x} * 512 + threadIdx.x; i < words; i += stride) {
    uint64_t z = (seed << 40) + static_cast<uint64_t>(i + 1) * 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    out[i] = z ^ z >> 31;
  }
}

__global__ void __launch_bounds__(256) turn_kernel(Packed from, uint32_t* to, int64_t words) {
  const int64_t stride = int64_t{gridDim.x} * 256;
  for (int64_t i = int64_t{blockIdx.x} * 256 + threadIdx.x; i < words; i += stride) {
    to[i] = turned_word(from, i);
  }
}

// Reads and nothing else; writes only what random bits do not give.
__global__ void __launch_bounds__(512)
    read_kernel(const uint4* from, int64_t count, uint32_t* out) {
  constexpr int kAhead = 8;
  const int64_t stride = int64_t{gridDim.x} * 512;
  uint32_t mixed = 0;
  int64_t i = int64_t{blockIdx.x} * 512 + threadIdx.x;
  for (; i + (kAhead - 1) * stride < count; i += kAhead * stride) {
    uint4 got[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) got[k] = __ldcs(from + i + k * stride);
#pragma unroll
    for (int k = 0; k < kAhead; ++k) mixed += got[k].x ^ got[k].y ^ got[k].z ^ got[k].w;
  }
  for (; i < count; i += stride) mixed += from[i].x ^ from[i].w;
  if (mixed == 0x12345678) *out = mixed;
}

// Host

struct Random {
  uint64_t state;
  uint64_t bits() {
    uint64_t z = state += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
  }
  float uniform() { return static_cast<float>(bits() >> 40) * 0x1p-24f; }
  float normal() {  // near enough
    float sum = -6;
    for (int i = 0; i < 12; ++i) sum += uniform();
    return sum;
  }
};

// Rotated and quantised, as the page of the format says it.
struct Quantised {
  std::vector<int8_t> q;
  float scale;
};

Quantised quantised(std::vector<float> x) {
  for (size_t block = 0; block < x.size(); block += kBlock) {
    for (size_t stride = 1; stride < kBlock; stride *= 2) {
      for (size_t i = 0; i < kBlock; ++i) {
        if (i & stride) continue;
        const float a = x[block + i], b = x[block + i + stride];
        x[block + i] = a + b;
        x[block + i + stride] = a - b;
      }
    }
  }
  float peak = 0;
  for (const float value : x) peak = std::max(peak, std::fabs(value));
  const float to_q = peak > 0 ? 127.0f / peak : 0.0f;
  Quantised out{std::vector<int8_t>(x.size()), (peak / 127.0f) * kInverseSqrt};
  for (size_t i = 0; i < x.size(); ++i) {
    out.q[i] = static_cast<int8_t>(std::nearbyint(x[i] * to_q));
  }
  return out;
}

// Integer sums of rows begin .. end by the textbook: a parity for each z, a table, a product.
void sum_rows(const Packed& p, const std::vector<int>& table, const std::vector<int8_t>& q,
              int lane, std::vector<int>& sums) {
  for (int col = 0; col < p.cols; ++col) {
    uint32_t window = 0;
    for (int row = lane; row < p.rows; row += kLanes) {
      window = (window << 1 | u_of(p, row, col)) & 0x1ff;
      const uint32_t z1 = static_cast<uint32_t>(std::popcount(window & kPart1)) & 1;
      const uint32_t z0 = static_cast<uint32_t>(std::popcount(window & kPart0)) & 1;
      const uint32_t index = 4 * raw_of(p, row, col) + 2 * z1 + z0;
      sums[static_cast<size_t>(row)] += table[index] * q[static_cast<size_t>(col)];
    }
  }
}

std::vector<int> sums_of(const Packed& p, const std::vector<int>& table,
                         const std::vector<int8_t>& q) {
  std::vector<int> sums(static_cast<size_t>(p.rows));
  std::vector<std::thread> threads;
  for (int lane = 0; lane < kLanes; ++lane) {
    threads.emplace_back([&, lane] { sum_rows(p, table, q, lane, sums); });
  }
  for (std::thread& thread : threads) thread.join();
  return sums;
}

// The decoding of the kernel on the host, from turned codes.
template <int kBits>
std::vector<int> turned_sums(const Packed& p, const std::vector<int>& table,
                             const std::vector<int8_t>& q) {
  const Tables tables = words_of(table);
  std::vector<int> sums(static_cast<size_t>(p.rows));
  int total = 0;
  for (const int8_t value : q) total += value;
  const int pieces = p.rows / (kLanes * kSteps), groups = p.cols / kGroup;
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int group = 0; group < groups; ++group) {
      for (int thread = 0; thread < 32; ++thread) {
        uint32_t u[kMemory + 1] = {};
        uint32_t x[8] = {};
        for (int i = 0; i < kColumns; ++i) {
          const auto value =
              static_cast<uint8_t>(q[static_cast<size_t>(group * kGroup + thread * kColumns + i)]);
          x[i / 4] |= uint32_t{value} << 8 * (i % 4);
        }
        for (int t = 0; t < pieces * kSteps; ++t) {
          uint32_t raw[3] = {};
          for (int i = 0; i < kMemory; ++i) u[i] = u[i + 1];
          for (int plane = 0; plane < kBits; ++plane) {
            const int64_t piece = (int64_t{lane} * groups + group) * pieces + t / kSteps;
            const int64_t at = ((piece * kBits + plane) * 32 + thread) * kSteps + t % kSteps;
            (plane == 0 ? u[kMemory] : raw[plane - 1]) = turned_word(p, at);
          }
          int& sum = sums[static_cast<size_t>(lane + kLanes * t)];
          sum = step_sum<kBits>(u, raw, tables, x, sum);
        }
      }
    }
  }
  for (int& sum : sums) sum -= 64 * total;
  return sums;
}

template <int kBits>
void check_on_host() {
  const int rows = 256, cols = 2048;
  Random random{kBits};
  std::vector<uint8_t> codes(static_cast<size_t>(rows) * cols * kBits / 8);
  for (uint8_t& byte : codes) byte = static_cast<uint8_t>(random.bits());
  std::vector<int8_t> q(cols);
  for (int8_t& value : q) value = static_cast<int8_t>(static_cast<int>(random.bits() % 255) - 127);
  std::vector<int> table(2 << kBits);  // not even symmetric
  for (int& value : table) value = static_cast<int>(random.bits() % 127) - 63;
  const Packed p{codes.data(), rows, cols, kBits};
  if (turned_sums<kBits>(p, table, q) != sums_of(p, table, q)) {
    throw std::runtime_error("[sketch_gemv] sums of " + std::to_string(kBits) +
                             " bits on the host: want those of the format.");
  }
  std::printf("%d bits: decoding agrees with the format on the host\n", kBits);
}

template <typename T>
T* allocate(int64_t count) {
  void* data = nullptr;
  want(cudaMalloc(&data, static_cast<size_t>(count) * sizeof(T)), "cudaMalloc");
  return static_cast<T*>(data);
}

template <typename T>
T* uploaded(const std::vector<T>& values) {
  T* data = allocate<T>(static_cast<int64_t>(values.size()));
  want(cudaMemcpy(data, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice),
       "cudaMemcpy");
  return data;
}

template <typename T>
std::vector<T> downloaded(const T* data, int64_t count) {
  std::vector<T> values(static_cast<size_t>(count));
  want(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  want(cudaMemcpy(values.data(), data, values.size() * sizeof(T), cudaMemcpyDeviceToHost),
       "cudaMemcpy");
  return values;
}

template <typename... Args>
void launch(void (*kernel)(Args...), int blocks, int threads, size_t bytes, cudaStream_t stream,
            bool early, Args... args) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = early ? 1 : 0;
  want(cudaLaunchKernelEx(&config, kernel, args...), "cudaLaunchKernelEx");
}

cudaGraphExec_t graph_of(cudaStream_t stream, const std::function<void()>& work) {
  work();  // outside of the graph: kernels are loaded when they run first
  want(cudaStreamSynchronize(stream), "the first run");
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t ready = nullptr;
  want(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
  work();
  want(cudaStreamEndCapture(stream, &graph), "cudaStreamEndCapture");
  want(cudaGraphInstantiate(&ready, graph, 0), "cudaGraphInstantiate");
  return ready;
}

struct Timed {
  std::string name;
  int bits;
  int64_t bytes;  // of all codes that are read
  int layers;     // in the graph
  cudaGraphExec_t graph;
  std::vector<double> microseconds;  // of a replay
};

struct Layers {
  Params params{};
  std::vector<uint8_t> packed[kMatrices];  // of the last layer
  std::vector<float> steps[kMatrices];
  std::vector<uint32_t> places[kMatrices];
  std::vector<int> table;
  uint4* codes = nullptr;            // of all
  __nv_bfloat16* outputs = nullptr;  // of all
  int64_t n_outputs = 0;
  int64_t bytes = 0;
};

int processors() {
  int value = 0;
  want(cudaDeviceGetAttribute(&value, cudaDevAttrMultiProcessorCount, 0), "cudaDeviceGetAttribute");
  return value;
}

Layers make(int bits, cudaStream_t stream) {
  Layers layers;
  Random random{static_cast<uint64_t>(bits) << 20};
  layers.table = table_of(bits);
  layers.params.tables = words_of(layers.table);
  double power = 0;
  for (const int value : layers.table) power += value * value / double(layers.table.size());
  int64_t words = 0, most = 0;
  for (const Shape& s : kShapes) layers.n_outputs += kLayers * s.rows;
  layers.outputs = allocate<__nv_bfloat16>(layers.n_outputs);
  __nv_bfloat16* y = layers.outputs;
  for (const Shape& s : kShapes) {
    words += int64_t{s.rows} * s.cols * bits / 32;
    most = std::max(most, int64_t{s.rows} * s.cols * bits / 8);
  }
  layers.bytes = kLayers * words * 4;
  layers.codes = reinterpret_cast<uint4*>(allocate<uint32_t>(kLayers * words));
  auto* packed = allocate<uint8_t>(most);
  auto* at = reinterpret_cast<uint32_t*>(layers.codes);

  std::vector<__nv_bfloat16> input(4096);
  for (__nv_bfloat16& value : input) value = __float2bfloat16_rn(random.normal());
  const __nv_bfloat16* x = uploaded(input);
  for (int phase = 0; phase < kPhases; ++phase) {
    const int which = phase % kMatrices;
    const Shape& s = kShapes[which];
    const int64_t count = int64_t{s.rows} * s.cols * bits / 32;
    launch(bits_kernel, 1024, 512, 0, stream, false, reinterpret_cast<uint64_t*>(packed), count / 2,
           static_cast<uint64_t>(100 * bits + phase));
    launch(turn_kernel, 4096, 256, 0, stream, false, Packed{packed, s.rows, s.cols, bits}, at,
           count);
    if (phase + kMatrices >= kPhases) layers.packed[which] = downloaded(packed, count * 4);

    std::vector<float> steps(static_cast<size_t>(s.rows));
    std::vector<uint32_t> places(static_cast<size_t>(s.rows));
    const int next = kShapes[(which + 1) % kMatrices].cols;
    for (int r = 0; r < s.rows; ++r) {
      const float step = (0.5f + random.uniform()) / static_cast<float>(std::sqrt(power * s.cols));
      steps[static_cast<size_t>(r)] = __bfloat162float(__float2bfloat16_rn(step));
      places[static_cast<size_t>(r)] = static_cast<uint32_t>(r);
    }
    for (int r = next - 1; r > 0; --r) {
      std::swap(places[static_cast<size_t>(r)],
                places[random.bits() % static_cast<uint64_t>(r + 1)]);
    }
    for (int r = 0; r < next; ++r) places[static_cast<size_t>(r)] |= (random.bits() & 1) << 31;
    Matrix& m = layers.params.matrices[phase];
    m = {.codes = reinterpret_cast<const uint4*>(at),
         .step = uploaded(steps),
         .place = uploaded(places),
         .x = x,
         .y = y,
         .rows = s.rows,
         .cols = s.cols};
    x = m.y;
    y += s.rows;
    at += count;
    layers.steps[which] = std::move(steps);
    layers.places[which] = std::move(places);
  }
  want(cudaStreamSynchronize(stream), "turning");
  want(cudaFree(packed), "cudaFree");
  layers.params.arrived = allocate<unsigned>(1);
  return layers;
}

// Writes NaN to all outputs.
void poison(const Layers& layers, cudaStream_t stream) {
  want(cudaMemsetAsync(layers.outputs, 0xff, static_cast<size_t>(layers.n_outputs) * 2, stream),
       "cudaMemsetAsync");
}

// Compares the outputs of the last layer with the host's, bit for bit.
void check(const Layers& layers, int bits, const std::string& name) {
  for (int which = 0; which < kMatrices; ++which) {
    const Matrix& m = layers.params.matrices[kPhases - kMatrices + which];
    const std::vector<__nv_bfloat16> x = downloaded(m.x, m.cols);
    const std::vector<__nv_bfloat16> y = downloaded(m.y, m.rows);
    std::vector<float> wide(x.size());
    std::transform(x.begin(), x.end(), wide.begin(),
                   [](__nv_bfloat16 v) { return __bfloat162float(v); });
    const Quantised in = quantised(std::move(wide));
    static std::vector<int8_t> known[5][kMatrices];  // inputs of sums that were made already
    static std::vector<int> made[5][kMatrices];
    if (known[bits][which] != in.q) {
      known[bits][which] = in.q;
      made[bits][which] =
          sums_of(Packed{layers.packed[which].data(), m.rows, m.cols, bits}, layers.table, in.q);
    }
    for (size_t r = 0; r < y.size(); ++r) {
      const uint32_t place = layers.places[which][r];
      const float out =
          static_cast<float>(made[bits][which][r]) * layers.steps[which][r] * in.scale;
      const __nv_bfloat16 wanted = __float2bfloat16_rn(place >> 31 ? -out : out);
      const __nv_bfloat16 got = y[place & 0x7fffffff];
      if (__bfloat16_as_ushort(wanted) != __bfloat16_as_ushort(got)) {
        throw std::runtime_error("[sketch_gemv] " + name + ", " + std::to_string(bits) +
                                 " bits: " + kShapes[which].name + " row " + std::to_string(r) +
                                 " is " + std::to_string(__bfloat162float(got)) + ": want " +
                                 std::to_string(__bfloat162float(wanted)) + ".");
      }
    }
  }
}

template <int kBits, int kWarps, int kSlots, bool kResident, Kind kKind = Kind::kAll>
void add(std::vector<Timed>& timed, const Layers& layers, cudaStream_t stream,
         const std::string& name) {
  auto* kernel = gemv_kernel<kBits, kWarps, kSlots, kResident, kKind>;
  const size_t bytes = sizeof(Shared<kBits, kWarps, kSlots>);
  want(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                            static_cast<int>(bytes)),
       "cudaFuncSetAttribute");
  cudaFuncAttributes attributes;
  want(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes");
  const int blocks = processors();
  if (kKind == Kind::kAll) poison(layers, stream);
  const auto work = [&] {
    Params p = layers.params;
    if constexpr (kResident) {
      want(cudaMemsetAsync(p.arrived, 0, sizeof(unsigned), stream), "cudaMemsetAsync");
      p.first = 0;
      p.last = kPhases;
      launch(kernel, blocks, 32 * kWarps, bytes, stream, false, p);
    } else {
      for (int phase = 0; phase < kPhases; ++phase) {
        p.first = 0;
        p.last = 1;
        p.matrices[0] = layers.params.matrices[phase];
        launch(kernel, blocks, 32 * kWarps, bytes, stream, phase > 0, p);
      }
    }
  };
  const std::string full =
      name + " warps=" + std::to_string(kWarps) + " slots=" + std::to_string(kSlots);
  timed.push_back({full, kBits, layers.bytes, kLayers, graph_of(stream, work), {}});
  if (kKind == Kind::kAll) {
    check(layers, kBits, full);
    poison(layers, stream);
    want(cudaGraphLaunch(timed.back().graph, stream), "cudaGraphLaunch");
    check(layers, kBits, full + " as a graph");
  }
  std::printf("%d bits %-44s %3d registers, %zu bytes local, %zu shared%s\n", kBits, full.c_str(),
              attributes.numRegs, attributes.localSizeBytes, bytes,
              kKind == Kind::kAll ? ": outputs as on the host" : "");
  std::fflush(stdout);
}

template <int kBits>
void add_all(std::vector<Timed>& timed, const Layers& layers, cudaStream_t stream) {
  constexpr int kSmall = 24 / kBits;  // 96 KB of slots for 8 warps, two blocks a processor
  add<kBits, 8, kSmall, false>(timed, layers, stream, "chain");
  add<kBits, 16, kSmall, false>(timed, layers, stream, "chain alone");
  add<kBits, 16, kSmall, true>(timed, layers, stream, "resident");
  add<kBits, 16, kSmall / 2, true>(timed, layers, stream, "resident");
  add<kBits, 16, kSmall, true, Kind::kLoads>(timed, layers, stream, "resident, loads only");
  add<kBits, 16, kSmall, true, Kind::kArithmetic>(timed, layers, stream,
                                                  "resident, arithmetic only");
  add<kBits, 16, kSmall, true, Kind::kNoWait>(timed, layers, stream, "resident, nobody waits");
  const int blocks = 4 * processors();
  auto* out = allocate<uint32_t>(1);
  const auto read = [&, out] {
    launch(read_kernel, blocks, 512, 0, stream, false, static_cast<const uint4*>(layers.codes),
           layers.bytes / 16, out);
  };
  timed.push_back({"reader", kBits, layers.bytes, kLayers, graph_of(stream, read), {}});
}

double quantile(std::vector<double> values, double q) {
  std::sort(values.begin(), values.end());
  return values[static_cast<size_t>(q * static_cast<double>(values.size() - 1) + 0.5)];
}

int run(int argc, char** argv) {
  int runs = 60;
  std::string json;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    if (word == "--host") {
      check_on_host<2>();
      check_on_host<3>();
      check_on_host<4>();
      return 0;
    }
    if (i + 1 == argc || (word != "--runs" && word != "--json")) {
      throw std::runtime_error("[sketch_gemv] " + word + ": want --host, --runs N or --json FILE.");
    }
    ++i;
    if (word == "--runs") runs = std::atoi(argv[i]);
    if (word == "--json") json = argv[i];
  }
  cudaStream_t stream = nullptr;
  want(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
  std::vector<Timed> timed;
  const Layers two = make(2, stream), three = make(3, stream), four = make(4, stream);
  add_all<3>(timed, three, stream);
  add_all<2>(timed, two, stream);
  add_all<4>(timed, four, stream);

  cudaEvent_t begin = nullptr, end = nullptr;
  want(cudaEventCreate(&begin), "cudaEventCreate");
  want(cudaEventCreate(&end), "cudaEventCreate");
  for (int round = -3; round < runs; ++round) {
    for (Timed& t : timed) {
      want(cudaEventRecord(begin, stream), "cudaEventRecord");
      want(cudaGraphLaunch(t.graph, stream), "cudaGraphLaunch");
      want(cudaEventRecord(end, stream), "cudaEventRecord");
      want(cudaEventSynchronize(end), "a replay");
      float milliseconds = 0;
      want(cudaEventElapsedTime(&milliseconds, begin, end), "cudaEventElapsedTime");
      if (round >= 0) t.microseconds.push_back(1e3 * milliseconds);
    }
  }
  double best = 0;
  for (const Timed& t : timed) {
    if (t.name == "reader") best = std::max(best, t.bytes / (quantile(t.microseconds, .5) * 1e-6));
  }
  std::FILE* file = json.empty() ? nullptr : std::fopen(json.c_str(), "w");
  if (!json.empty() && file == nullptr) {
    throw std::runtime_error("[sketch_gemv] " + json + ": want a file that can be written.");
  }
  if (file) std::fprintf(file, "{\"read_bandwidth\": %.6g, \"rows\": [", best);
  std::printf("%-52s %4s %9s %9s %9s %9s\n", "a layer", "bits", "us", "p10", "p90", "of read");
  const char* separator = "\n";
  for (const Timed& t : timed) {
    const double median = quantile(t.microseconds, .5) / t.layers;
    const double low = quantile(t.microseconds, .1) / t.layers;
    const double high = quantile(t.microseconds, .9) / t.layers;
    const double fraction = t.bytes / (median * t.layers * 1e-6) / best;
    std::printf("%-52s %4d %9.2f %9.2f %9.2f %9.3f\n", t.name.c_str(), t.bits, median, low, high,
                fraction);
    if (file) {
      std::fprintf(file,
                   "%s{\"design\": \"%s\", \"bits\": %d, \"median_us\": %.5g, \"p10_us\": %.5g, "
                   "\"p90_us\": %.5g, \"bytes\": %lld, \"fraction_of_read_bandwidth\": %.4g}",
                   separator, t.name.c_str(), t.bits, median, low, high,
                   static_cast<long long>(t.bytes / t.layers), fraction);
    }
    separator = ",\n";
  }
  if (file) {
    std::fprintf(file, "]}\n");
    std::fclose(file);
  }
  std::printf("read bandwidth %.4g TB/s\n", best * 1e-12);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
