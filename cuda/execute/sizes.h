// What execute's choice and its kernels both know: how much a block takes, of what, and where.
//
// Bounds of shared memory are the kernels' to keep: each asserts that what it has is no more.
#pragma once

#include "common/sizes.h"

namespace csfast::cuda {

inline constexpr int kGatherThreads = 512;  // one block a processor: 128 registers a thread
inline constexpr int kGatherWarps = kGatherThreads / kWarp;
inline constexpr int kLaneColumns = 8;  // that a load of 16 bytes brings: of two bytes each
inline constexpr int kVectorsMax = 2;   // loads of a row by one thread: what registers allow

// Neurons of a group between two barriers. From registers, 12 loads of 16 bytes a thread: 98 KB on
// the way to a processor, of which a third at least while others are used; 26 KB keep memory busy
// (4.3 TB/s for .8 us over 132 processors).
template <int kVectors>
constexpr int kRegisterNeurons = 4 / kVectors;
template <int kVectors>
constexpr int kBulkNeurons = kVectors == 1 ? 2 : 1;

// The ring: slots of three rows of the neurons of all groups between two barriers, 48 KB where the
// groups are full, four of them: 192 KB, of which half are on the way at any time.
inline constexpr int kSlots = 4;
template <int kVectors>
constexpr int kSlotBytes =
    3 * kBulkNeurons<kVectors> * kVectors * kGatherThreads * kLaneColumns * 2;
template <int kVectors>
constexpr int kRingBytes = kSlots * kSlotBytes<kVectors>;

// Room for the sums of all groups of a block, whose columns are together those of a full one;
// shared with the ring, where there is one.
template <int kVectors>
constexpr int kSumBytes = kVectors == 1 ? kGatherThreads * kLaneColumns * int{sizeof(float)} : 0;

// What a block of gather has of shared memory beside ring and list, at most.
inline constexpr int kGatherOtherBytes = 24 << 10;
// Likewise a block of activate_rows or of combine_rows beside the list, and with rings.
inline constexpr int kRowsBytes = 36 << 10;
inline constexpr int kRowsBulkBytes = 152 << 10;

inline constexpr int kCombineColumns = 512;  // of the output, of a block: a kilobyte of a row
inline constexpr int kStepNeurons = 16;      // that are added at once

}  // namespace csfast::cuda
