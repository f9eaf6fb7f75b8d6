// The operations on the CPU, for callers that have checked: <op>.cc and the compositions.
#pragma once

#include <cstdint>

#include "csfast/execute.h"
#include "csfast/select.h"

namespace csfast::host {

int64_t select_workspace(int64_t batch, int64_t d, int64_t n_neurons);
void select(const SelectParams& p);

int64_t execute_workspace(int64_t batch, int64_t d);
void execute(const ExecuteParams& p);

}  // namespace csfast::host
