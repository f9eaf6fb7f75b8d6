// The arguments that describe a layer, by the names that every binding gives them: whoever takes a
// layer, or a part of it, unpacks it here.
#pragma once

#include "call.h"
#include "codes.h"
#include "csfast/layer.h"

struct SensorArgs {
  nb::handle codes, equal, row_scale, offset;
  int code;
};

struct WeightsArgs {
  nb::handle gate, up, down_t, gate_bias, up_bias, down_bias;
};

struct DecisionArgs {
  nb::handle threshold, votes, cap;
  int tile_rows;
};

// The sizes that the tensors of a layer share with the others of the call.
struct LayerSizes {
  Size batch{"batch"}, d{"d"}, n{"n_neurons"}, one{"1", 1}, two{"2", 2};

  // Of decisions: a row each, or all rows together.
  Size& lists(nb::handle votes) { return votes.is_none() ? batch : one; }
};

inline csfast::Sensor unpack(Call& call, LayerSizes& sizes, const SensorArgs& args) {
  csfast::Sensor sensor{};
  sensor.code = code_of(args.code);
  CodeSizes code_sizes(sensor.code, sizes.d);
  sensor.codes = call.in<uint8_t>(args.codes, "codes",
                                  {&sizes.n, &sizes.two, &code_sizes.groups, &code_sizes.bytes});
  sensor.equal = call.in<float>(args.equal, "equal", {&sizes.d});
  sensor.row_scale = call.in<float>(args.row_scale, "row_scale", {&sizes.n, &sizes.two});
  sensor.offset = call.in_or_null<float>(args.offset, "offset", {&sizes.n, &sizes.two});
  return sensor;
}

inline csfast::Weights unpack(Call& call, LayerSizes& sizes, const WeightsArgs& args) {
  csfast::Weights weights{};
  weights.gate = call.in_type(args.gate, "gate", {&sizes.n, &sizes.d});
  weights.up = call.in_type(args.up, "up", {&sizes.n, &sizes.d});
  weights.down_t = call.in_type(args.down_t, "down_t", {&sizes.n, &sizes.d});
  weights.gate_bias = call.in_type_or_null(args.gate_bias, "gate_bias", {&sizes.n});
  weights.up_bias = call.in_type_or_null(args.up_bias, "up_bias", {&sizes.n});
  weights.down_bias = call.in_type_or_null(args.down_bias, "down_bias", {&sizes.d});
  return weights;
}

// Thresholds and caps have `lists` entries.
inline csfast::Decision unpack(Call& call, LayerSizes& sizes, Size& lists,
                               const DecisionArgs& args) {
  csfast::Decision decision{};
  decision.threshold = call.in<float>(args.threshold, "threshold", {&lists});
  decision.votes = call.in_or_null<float>(args.votes, "votes", {&sizes.batch});
  decision.cap = call.in_or_null<int32_t>(args.cap, "cap", {&lists});
  decision.tile_rows = args.tile_rows;
  return decision;
}

// An attribute of a Python object that keeps it.
inline nb::handle field(nb::handle object, const char* name) {
  return nb::object(object.attr(name));
}

// The same of a csfast.layer.Layer, which keeps the tensors; `code` is that of its bits.
inline SensorArgs sensor_of(nb::handle layer, int code) {
  nb::handle s = field(layer, "sensor");
  return {field(s, "codes"), field(s, "equal"), field(s, "row_scale"), field(s, "offset"), code};
}
inline WeightsArgs weights_of(nb::handle layer) {
  nb::handle w = field(layer, "weights");
  return {field(w, "gate"),      field(w, "up"),      field(w, "down_t"),
          field(w, "gate_bias"), field(w, "up_bias"), field(w, "down_bias")};
}
inline DecisionArgs decision_of(nb::handle layer) {
  nb::handle d = field(layer, "decision");
  return {field(d, "threshold"), field(d, "votes"), field(d, "cap"),
          nb::cast<int>(field(d, "tile_rows"))};
}

// When a tensor of type T has been unpacked, and all of these sizes are known.
inline csfast::Form form_of(const Call& call, const LayerSizes& sizes, const char* activation) {
  return {.d = sizes.d,
          .n_neurons = sizes.n,
          .dtype = call.dtype(),
          .activation = call.activation(activation)};
}
