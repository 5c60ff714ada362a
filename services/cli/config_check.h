// SPDX-License-Identifier: Apache-2.0
// Can this configuration work? Physics before anything is started: what each process will hold against the memory
// there is, how much context fits, and who has which expert.
//
// The document's own rules (types, ranges, names) are services/common/config's and have been applied before. Sizes come
// from the inspect report and the cache's layout, the same that engines allocate by; what a pass needs beside them is
// an estimate, and says so. Thread: pure functions.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "engine/model/model_report.h"
#include "millrace/v1/config.pb.h"
#include "nlohmann/json.hpp"

namespace millrace::cli {

// Bytes that one process takes, and where.
struct ProcessNeed {
  std::string name, role;
  bool on_gpu = false;
  int64_t weights = 0;  // packed, as the engine holds them
  int64_t pages = 0;    // cache_pages times a page
  int64_t slots = 0;    // max_sequences times a state slot
  int64_t buffers = 0;  // estimated: activations of one pass, the program (blocks on the wire are the cache itself)
  int64_t total() const { return weights + pages + slots + buffers; }
};

enum class Severity { kNote, kWarning, kError };

struct Finding {
  Severity severity = Severity::kNote;
  std::string field;  // "decode[0].cache_pages"
  std::string text;   // what is, what is allowed, what would fit
};

// What there is. 0: unknown, and not judged.
struct MemoryBudget {
  int64_t host = 0;             // of the machine, or of each process if they run apart
  int64_t gpu = 0;              // of the card of each worker that has one
  bool one_machine = false;     // all processes share `host`
  std::string host_is, gpu_is;  // for people: "this machine's", "as given"
};

struct ConfigReport {
  std::vector<ProcessNeed> processes;
  std::vector<Finding> findings;  // errors first
  int errors() const;
};

ConfigReport CheckConfig(const v1::ClusterConfig& config, const ModelReport& model, const MemoryBudget& memory);

// Whether every worker listens on loopback, so that all run on one machine.
bool RunsOnOneMachine(const v1::ClusterConfig& config);

// For a terminal: a table of processes, then findings, one line each.
std::string ConfigReportText(const ConfigReport& report, const MemoryBudget& memory, bool colour);
nlohmann::ordered_json ConfigReportJson(const ConfigReport& report, const MemoryBudget& memory);

}  // namespace millrace::cli
