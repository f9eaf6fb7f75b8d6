// The rows that bench_ffn prints, as text or as JSON of the form that docs/cli.md describes.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <string>
#include <utility>
#include <vector>

#include "cases.h"

namespace csfast::bench {

// Of one call, in seconds. Ranks are rounded, nothing is interpolated.
struct Timing {
  double median, p10, p90;
};

inline Timing timing_of(std::vector<double> seconds) {
  std::sort(seconds.begin(), seconds.end());
  const auto at = [&](double fraction) {
    return seconds[std::lround(fraction * static_cast<double>(seconds.size() - 1))];
  };
  return {at(0.5), at(0.1), at(0.9)};
}

struct Row {
  Case of;
  std::string variant;
  Timing timing;
  double bytes;             // that a call has to read
  int64_t workspace_bytes;  // that a call is given
  double dense;             // seconds of the same layer with all its neurons
  double read_bandwidth;    // bytes a second, measured in turns with the row
  bool executes;            // so that a share of the dense time can be asked of it

  double fraction() const { return bytes / timing.median / read_bandwidth; }
  double ratio() const { return dense / timing.median; }
  // The share of the dense time that is due, over the time taken: 1 is ideal.
  double sigma() const { return of.density * ratio(); }
};

inline std::string text_of(const char* format, auto... values) {
  char text[1024];
  std::snprintf(text, sizeof text, format, values...);
  return text;
}

inline std::string to_text(const Row& row) {
  std::string text = text_of(
      "%-52s %-8s %9.2f us (%.2f .. %.2f)  %.2f of read bandwidth  all neurons %.1f us  %.2fx",
      name_of(row.of).c_str(), row.variant.c_str(), row.timing.median * 1e6, row.timing.p10 * 1e6,
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
      name_of(row.of).c_str(), row.variant.c_str(), row.of.density,
      static_cast<long long>(row.of.batch), row.timing.median * 1e6, row.timing.p10 * 1e6,
      row.timing.p90 * 1e6, row.bytes, row.fraction(), static_cast<long long>(row.workspace_bytes),
      row.dense * 1e6, row.ratio(), row.ratio(),
      row.executes ? text_of("%.4f", row.sigma()).c_str() : "null");
}

// A string of JSON; nothing in it is beyond ASCII.
inline std::string quoted(const std::string& text) {
  std::string found = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') found += '\\';
    found += c < ' ' ? ' ' : c;
  }
  return found + '"';
}

// Prints {"machine": {...}, "rows": [...]}; `machine` holds pairs of a name and JSON.
inline void print_json(const std::vector<std::pair<std::string, std::string>>& machine,
                       const std::vector<Row>& rows) {
  std::string text = "{\"machine\": {";
  for (const auto& [name, value] : machine) {
    text += (&name == &machine.front().first ? "" : ", ") + quoted(name) + ": " + value;
  }
  text += "},\n \"rows\": [\n";
  for (const Row& row : rows) text += "  " + to_json(row) + (&row == &rows.back() ? "\n" : ",\n");
  std::fputs((text + " ]}\n").c_str(), stdout);
}

}  // namespace csfast::bench
