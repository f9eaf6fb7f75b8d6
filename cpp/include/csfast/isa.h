// Isa: which instruction set the loops of the CPU backend use.
#pragma once

namespace csfast {

// "base", "avx2" or "avx512": the best that this processor can run, unless the environment variable
// CSFAST_ISA names one. Decided at the first call. Throws BackendError if CSFAST_ISA names none, or
// one that the processor cannot run.
const char* isa();

}  // namespace csfast
