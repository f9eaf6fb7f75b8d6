// Stands in for every cuda/*.cu when csfast is built without CUDA.
#include <string>

#include "csfast/encode.h"
#include "csfast/execute.h"
#include "csfast/ffn.h"
#include "csfast/linear.h"
#include "csfast/nested.h"
#include "csfast/omp.h"
#include "csfast/project.h"
#include "csfast/read.h"
#include "csfast/recover.h"
#include "csfast/select.h"
#include "csfast/sense.h"
#include "csfast/sketch.h"
#include "csfast/tile.h"

namespace csfast::cuda {
namespace {
[[noreturn]] void missing(const char* op) {
  throw BackendError(std::string("[") + op + "] csfast was built without CUDA.");
}
}  // namespace

bool available() {
  return false;
}
int64_t encode_workspace(int64_t, int64_t) {
  missing("encode");
}
void encode(const EncodeParams&, Stream) {
  missing("encode");
}
void linear(const LinearParams&, Stream) {
  missing("linear");
}
void sense(const SenseParams&, Stream) {
  missing("sense");
}
void nested(const NestedParams&, Stream) {
  missing("nested");
}
void sketch(const SketchParams&, Stream) {
  missing("sketch");
}
void recover(const RecoverParams&, Stream) {
  missing("recover");
}
void tile(const TileParams&, Stream) {
  missing("tile");
}
int64_t omp_workspace(int64_t, int64_t, int64_t, OmpKernel) {
  missing("omp");
}
void omp(const OmpParams&, Stream) {
  missing("omp");
}
void project(const ProjectParams&, Stream) {
  missing("project");
}
int64_t read_sums() {
  missing("read");
}
void read(const ReadParams&, Stream) {
  missing("read");
}
int64_t execute_workspace(int64_t, int64_t, int64_t) {
  missing("execute");
}
void execute(const ExecuteParams&, Stream) {
  missing("execute");
}
int64_t select_workspace(int64_t, int64_t, int64_t) {
  missing("select");
}
void select(const SelectParams&, Stream) {
  missing("select");
}
int64_t ffn_workspace(int64_t, int64_t, int64_t) {
  missing("ffn");
}
void ffn(const FfnParams&, Stream) {
  missing("ffn");
}
Prepared prepare(const FfnParams&) {
  missing("ffn");
}
Replay replay(const FfnParams&) {
  missing("ffn");
}
void run(const Prepared&, const void*, void*, Stream) {
  missing("ffn");
}
struct Replay::State {};
Replay::Replay(Prepared) {
  missing("ffn");
}
Replay::Replay(Replay&&) noexcept = default;
Replay::~Replay() = default;
void Replay::run(const void*, void*, Stream) {
  missing("ffn");
}

}  // namespace csfast::cuda
