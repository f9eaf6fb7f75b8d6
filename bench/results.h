// What every benchmark in C++ prints: times, the head, and rows as JSON, in the form that
// docs/schemas.md describes.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <ctime>
#include <fstream>
#include <string>
#include <utility>
#include <vector>

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

inline std::string text_of(const char* format, auto... values) {
  char text[1024];
  std::snprintf(text, sizeof text, format, values...);
  return text;
}

// Says which rows cannot be true, on stderr, and gives their number: they read faster than reading
// alone, which of layers that no cache holds, on a machine that does nothing else, none does.
template <typename Row>
int too_fast(const std::vector<Row>& rows) {
  int found = 0;
  for (const Row& row : rows) {
    if (row.fraction() <= 1) continue;
    ++found;
    std::fprintf(stderr, "[bench] %s %s: %.3f of what reading alone reaches: want at most 1.\n",
                 row.name(), row.variant.c_str(), row.fraction());
  }
  return found;
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

// Names with their values, which are JSON.
using Pairs = std::vector<std::pair<std::string, std::string>>;

inline std::string to_json(const Pairs& pairs) {
  std::string text = "{";
  for (const auto& [name, value] : pairs) {
    text += (text.size() > 1 ? ", " : "") + quoted(name) + ": " + value;
  }
  return text + "}";
}

// The head of all results, as python/csfast/bench/head.py has it.
struct Head {
  std::vector<std::string> command;
  std::string commit;  // as the command line says; empty if it does not
  Pairs machine;       // the device first
  Pairs versions;
};

// Without the folder of the program: it is of one machine.
inline std::vector<std::string> command_of(int argc, char** argv) {
  std::vector<std::string> words(argv, argv + argc);
  words[0] = words[0].substr(words[0].rfind('/') + 1);
  return words;
}

// The day in UTC, such as 2026-01-31.
inline std::string today() {
  const std::time_t now = std::time(nullptr);
  char text[16];
  std::strftime(text, sizeof text, "%Y-%m-%d", std::gmtime(&now));
  return text;
}

// The processor's name; empty where the system does not tell.
inline std::string cpu_name() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    const size_t at = line.find(": ");
    if (line.rfind("model name", 0) == 0 && at != std::string::npos) return line.substr(at + 2);
  }
  return "";
}

// Prints one object: the head, the bytes a second that were read at best, and the rows, which are
// JSON.
inline void print_json(const Head& head, double read_bandwidth,
                       const std::vector<std::string>& rows) {
  std::string command;
  for (const std::string& word : head.command) {
    command += (command.empty() ? "" : ", ") + quoted(word);
  }
  std::string text = "{\"format\": \"csfast results 1\",\n\"command\": [" + command + "],\n";
  text += "\"commit\": " + (head.commit.empty() ? "null" : quoted(head.commit)) + ",\n";
  text += "\"date\": " + quoted(today()) + ",\n";
  text += "\"machine\": " + to_json(head.machine) + ",\n";
  text += "\"versions\": " + to_json(head.versions) + ",\n";
  text += "\"read_bandwidth\": " + text_of("%.5g", read_bandwidth) + ",\n\"rows\": [\n";
  for (const std::string& row : rows) text += row + (&row == &rows.back() ? "\n" : ",\n");
  std::fputs((text + "]\n}\n").c_str(), stdout);
}

}  // namespace csfast::bench
