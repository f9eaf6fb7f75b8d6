// The rows that bench_ffn prints, as text or as JSON of the form that docs/schemas.md describes.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cases.h"
#include "results.h"

namespace csfast::bench {

struct Row {
  Case of;
  std::string variant;
  Timing timing;
  double bytes;             // that a call has to read
  int64_t workspace_bytes;  // that a call is given
  double dense;             // seconds of the same layer with all its neurons
  double read_bandwidth;    // bytes a second, measured in turns with the row
  bool executes;            // so that a share of the dense time can be asked of it

  const char* name() const { return of.name; }
  double fraction() const { return bytes / timing.median / read_bandwidth; }
  double ratio() const { return dense / timing.median; }
  // The share of the dense time that is due, over the time taken: 1 is ideal.
  double sigma() const { return of.density * ratio(); }
};

inline std::string to_text(const Row& row) {
  std::string text = text_of(
      "%-42s %-8s %9.2f us (%.2f .. %.2f)  %.2f of read bandwidth  all neurons %.1f us  %.2fx",
      row.of.name, row.variant.c_str(), row.timing.median * 1e6, row.timing.p10 * 1e6,
      row.timing.p90 * 1e6, row.fraction(), row.dense * 1e6, row.ratio());
  if (row.executes) text += text_of("  sigma %.3f", row.sigma());
  return text;
}

inline std::string to_json(const Row& row) {
  return text_of(
      "{\"case\": \"%s\", \"variant\": \"%s\", \"density\": %.4f, \"batch\": %lld, "
      "\"median_us\": %.3f, \"p10_us\": %.3f, \"p90_us\": %.3f, \"bytes\": %.0f, "
      "\"fraction_of_read_bandwidth\": %.4f, \"workspace_bytes\": %lld, "
      "\"baselines\": {\"csfast all neurons\": %.3f}, \"ratio_vs_best\": %.4f, "
      "\"ratio_vs_dense\": %.4f, \"sigma\": %s}",
      row.of.name, row.variant.c_str(), row.of.density, static_cast<long long>(row.of.batch),
      row.timing.median * 1e6, row.timing.p10 * 1e6, row.timing.p90 * 1e6, row.bytes,
      row.fraction(), static_cast<long long>(row.workspace_bytes), row.dense * 1e6, row.ratio(),
      row.ratio(), row.executes ? text_of("%.4f", row.sigma()).c_str() : "null");
}

inline void print_json(const Head& head, double read_bandwidth, const std::vector<Row>& rows) {
  std::vector<std::string> lines;
  for (const Row& row : rows) lines.push_back(to_json(row));
  print_json(head, read_bandwidth, lines);
}

inline int too_fast(const std::vector<Row>& rows) {
  return too_fast<Row>(rows);
}

}  // namespace csfast::bench
