// SPDX-License-Identifier: Apache-2.0
// See config_check.h. Order: sizes, then what does not fit and what would, then context, experts and addresses.
#include "services/cli/config_check.h"

#include <algorithm>
#include <map>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "engine/cache/cache_layout.h"
#include "engine/model/checkpoint.h"
#include "services/cli/terminal.h"
#include "services/common/config.h"

namespace millrace::cli {
namespace {

// What a process of ours occupies that nothing here counts: program, libraries, heaps, threads.
constexpr int64_t kProgramBytes = 32 << 20;
// A card's driver and context, and room the engine keeps.
constexpr int64_t kGpuHeadroomBytes = 1 << 30;

int64_t KindBytes(const ModelReport& model, absl::string_view kind) {
  for (const TensorKindBytes& one : model.kinds) {
    if (one.kind == kind) return one.bytes;
  }
  return 0;
}

int64_t Product(const std::vector<int64_t>& shape) {
  int64_t product = 1;
  for (const int64_t dimension : shape) product *= dimension;
  return product;
}

// Bytes of weights as engines hold them, which differ from the file's where the arithmetic wants another width.
class Weights {
 public:
  Weights(const ModelReport& model, Numerics numerics) : model_(model) {
    const bool widened = numerics == Numerics::kExact && model.config.weight_format == WeightFormat::kFp8;
    const ModelConfig& c = model.config;
    const int64_t expert_parameters =
        int64_t{3} * c.hidden_size * c.moe_intermediate_size * c.num_hidden_layers * c.n_routed_experts;
    routed_ = KindBytes(model, "routed experts");
    rest_ = model.tensor_bytes - routed_ - KindBytes(model, "MTP");
    if (widened) {  // every code times its scale is exact in BF16
      routed_ = 2 * expert_parameters;
      rest_ = 2 * (model.parameters - expert_parameters);
    } else if (c.weight_format == WeightFormat::kFp8) {
      // Scales of experts become floats (one for 32 weights), the grouped output projection BF16.
      routed_ = expert_parameters / 2 + expert_parameters / 32 * 4;
      for (const TensorSpec& spec : TensorInventory(c)) {
        if (absl::EndsWith(spec.name, ".wo_a.weight") && !absl::StartsWith(spec.name, "mtp.")) {
          rest_ += Product(spec.shape);
        }
      }
    }
  }
  int64_t AllButRouted() const { return rest_; }
  int64_t Routed(int64_t experts) const { return routed_ / model_.config.n_routed_experts * experts; }

 private:
  const ModelReport& model_;
  int64_t routed_ = 0, rest_ = 0;
};

// One pass' activations in floats: streams before and after, queries and outputs of all heads, rows of experts.
int64_t PassBytes(const ModelConfig& c, int64_t rows, int64_t logit_rows) {
  const int64_t hidden = c.hidden_size;
  const int64_t row = 3 * c.hc_mult * hidden + 8 * hidden + int64_t{3} * c.num_attention_heads * c.head_dim +
                      int64_t{3} * c.num_experts_per_tok * hidden;
  return 4 * (rows * row + logit_rows * c.vocab_size);
}

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

std::string Field(const char* role, int i, const char* key) { return absl::StrCat(role, "[", i, "].", key); }

class Check {
 public:
  Check(const v1::ClusterConfig& config, const ModelReport& model, const MemoryBudget& memory)
      : config_(config),
        model_(model),
        memory_(memory),
        numerics_(NumericsOf(config, model)),
        layout_(CacheLayout::Make(model.config, numerics_, /*mtp=*/false)),
        weights_(model, numerics_) {}

  ConfigReport Run() {
    Model();
    Sizes();
    Memory();
    Context();
    Experts();
    Addresses();
    std::stable_sort(report_.findings.begin(), report_.findings.end(),
                     [](const Finding& a, const Finding& b) { return a.severity > b.severity; });
    return std::move(report_);
  }

 private:
  static Numerics NumericsOf(const v1::ClusterConfig& config, const ModelReport& model) {
    const bool plain = model.config.weight_format == WeightFormat::kPlain;
    return config.model().numerics() == "exact" || (config.model().numerics().empty() && plain) ? Numerics::kExact
                                                                                                : Numerics::kRelease;
  }

  void Add(Severity severity, std::string field, std::string text) {
    report_.findings.push_back({severity, std::move(field), std::move(text)});
  }
  bool on_gpu() const { return config_.model().device() == "cuda"; }
  bool has_pool() const { return config_.expert_size() > 0; }
  int64_t longest() const {
    const int64_t own = model_.config.max_position_embeddings;
    const int64_t asked = static_cast<int64_t>(config_.model().max_context_tokens());
    return asked > 0 ? std::min(asked, own) : own;
  }

  void Model() {
    const v1::ModelSection& section = config_.model();
    if (!model_.weights_present) {
      Add(Severity::kWarning, "model.path",
          "config.json is there, the weights are not; sizes are those they will have");
    }
    if (numerics_ == Numerics::kRelease && model_.config.weight_format == WeightFormat::kPlain) {
      Add(Severity::kError, "model.numerics", "release needs a quantised checkpoint, this one is not; use exact");
    }
    if (on_gpu() && numerics_ == Numerics::kExact) {
      Add(Severity::kError, "model.device",
          "cuda computes in release numerics only; use cpu, or model.numerics release");
    }
    const int64_t asked = static_cast<int64_t>(section.max_context_tokens());
    if (asked > model_.config.max_position_embeddings) {
      Add(Severity::kWarning, "model.max_context_tokens",
          absl::StrCat(asked, " is more than the model's ", model_.config.max_position_embeddings, ", which holds"));
    }
    if (config_.prefill_size() == 0)
      Add(Severity::kError, "prefill", "there is none, and nothing else computes prompts");
    if (config_.decode_size() == 0)
      Add(Severity::kError, "decode", "there is none, and nothing else continues prompts");
  }

  // --- Sizes ---

  template <typename Section>
  void AddWorker(const char* role, const Section& section, int64_t rows) {
    ProcessNeed need{.name = section.worker().name(), .role = role, .on_gpu = on_gpu()};
    int64_t experts = has_pool() ? 0 : model_.config.n_routed_experts;
    if (has_pool() && !section.local_experts().empty()) {
      const auto local = ParseExpertSet(section.local_experts(), model_.config.n_routed_experts);
      if (local.ok()) {
        experts = static_cast<int64_t>(local->size());
      } else {
        Add(Severity::kError, absl::StrCat(need.name, ".local_experts"), std::string(local.status().message()));
      }
    }
    need.weights = weights_.AllButRouted() + weights_.Routed(experts);
    need.pages = static_cast<int64_t>(section.cache_pages()) * layout_.page_bytes;
    need.slots = int64_t{section.max_sequences()} * layout_.slot_bytes;
    need.buffers = PassBytes(model_.config, rows, std::min<int64_t>(rows, section.max_sequences())) +
                   (on_gpu() ? kGpuHeadroomBytes : kProgramBytes);
    report_.processes.push_back(std::move(need));
  }

  void Sizes() {
    report_.processes.push_back({.name = "router", .role = "router", .buffers = kProgramBytes});
    for (const auto& section : config_.prefill()) AddWorker("prefill", section, section.max_batch_tokens());
    for (const auto& section : config_.decode()) AddWorker("decode", section, section.max_batch());
    for (int i = 0; i < config_.expert_size(); ++i) {
      const auto experts = WorkerConfig{config_, v1::ROLE_EXPERT, i}.ExpertsOf(model_.config.n_routed_experts);
      const bool on_gpu = config_.expert(i).device() == "cuda";
      ProcessNeed need{.name = config_.expert(i).worker().name(),
                       .role = "expert",
                       .on_gpu = on_gpu,
                       .buffers = on_gpu ? kGpuHeadroomBytes : kProgramBytes};
      if (experts.ok()) {
        need.weights = weights_.Routed(static_cast<int64_t>(experts->size()));
      } else {
        Add(Severity::kError, Field("expert", i, "experts"), std::string(experts.status().message()));
      }
      report_.processes.push_back(std::move(need));
    }
  }

  // --- Memory ---

  // How many cache pages fit when everything else stays as it is; negative: nothing fits however small the cache.
  std::string WhatFits(const ProcessNeed& need, int64_t available) const {
    const int64_t fits = (available - (need.total() - need.pages)) / layout_.page_bytes;
    if (need.role == "expert") {
      return "more members in the pool, or fewer experts a member";
    }
    if (fits < 1) {
      return absl::StrCat("weights, slots and buffers alone are ", HumanBytes(need.total() - need.pages),
                          has_pool() ? "; lower max_sequences, or give it more memory"
                                     : "; an expert pool would take its routed experts elsewhere");
    }
    return absl::StrCat("cache_pages ", fits, " fits (", fits * kPageTokens, " tokens)");
  }

  std::string FieldOf(const ProcessNeed& need) const {
    int position = 0;
    for (const ProcessNeed& one : report_.processes) {
      if (&one == &need) break;
      position += one.role == need.role;
    }
    return need.role == "router"
               ? "router"
               : Field(need.role.c_str(), position, need.role == "expert" ? "experts" : "cache_pages");
  }

  void Memory() {
    int64_t sum = 0;
    for (const ProcessNeed& need : report_.processes) {
      if (!need.on_gpu) sum += need.total();
      const int64_t available = need.on_gpu ? memory_.gpu : memory_.host;
      if (available == 0 || need.total() <= available) continue;
      Add(Severity::kError, FieldOf(need),
          absl::StrCat(need.name, " needs ", HumanBytes(need.total()), ", there are ", HumanBytes(available), " (",
                       need.on_gpu ? memory_.gpu_is : memory_.host_is, "): ", WhatFits(need, available)));
    }
    if (!memory_.one_machine || memory_.host == 0 || sum <= memory_.host || report_.errors() > 0) return;
    int64_t pages = 0;
    for (const ProcessNeed& need : report_.processes) pages += need.on_gpu ? 0 : need.pages;
    const int64_t left = memory_.host - (sum - pages);
    Add(Severity::kError, "cache_pages",
        absl::StrCat("all processes together need ", HumanBytes(sum), ", there are ", HumanBytes(memory_.host), " (",
                     memory_.host_is, "): ",
                     left > 0 ? absl::StrFormat("%.0f %% of each cache_pages fits", 100.0 * left / pages)
                              : "weights alone do not fit; use fewer processes or another machine"));
  }

  // --- Context ---

  void Context() {
    const int64_t pages = CeilDiv(longest(), kPageTokens);
    const auto check = [&](const char* role, int i, const std::string& name, int64_t cache_pages, int64_t sequences) {
      const int64_t whole = cache_pages / pages;
      if (whole == 0) {
        const bool asked = config_.model().max_context_tokens() > 0;
        Add(asked ? Severity::kError : Severity::kWarning, Field(role, i, "cache_pages"),
            absl::StrCat(
                cache_pages, " pages hold ", cache_pages * kPageTokens, " tokens, less than the ", longest(),
                " that a request may have: longer ones are refused; use ", pages,
                asked ? ", or lower model.max_context_tokens to " : ", or say so with model.max_context_tokens ",
                cache_pages * kPageTokens));
        return;
      }
      Add(Severity::kNote, Field(role, i, "cache_pages"),
          absl::StrCat(name, " holds ", whole, whole == 1 ? " sequence" : " sequences", " of ", longest(),
                       " tokens, or ", sequences, " of ", cache_pages / sequences * kPageTokens, " each"));
      if (cache_pages < sequences) {
        Add(Severity::kWarning, Field(role, i, "max_sequences"),
            absl::StrCat(sequences, " sequences need a page each, there are ", cache_pages, ": use at most ",
                         cache_pages));
      }
    };
    for (int i = 0; i < config_.prefill_size(); ++i) {
      const auto& section = config_.prefill(i);
      check("prefill", i, section.worker().name(), static_cast<int64_t>(section.cache_pages()),
            section.max_sequences());
    }
    for (int i = 0; i < config_.decode_size(); ++i) {
      const auto& section = config_.decode(i);
      check("decode", i, section.worker().name(), static_cast<int64_t>(section.cache_pages()), section.max_sequences());
      if (section.max_batch() > section.max_sequences()) {
        Add(Severity::kWarning, Field("decode", i, "max_batch"),
            absl::StrCat(section.max_batch(), " rows a pass, but only ", section.max_sequences(),
                         " sequences can be there: use ", section.max_sequences()));
      }
    }
    if (static_cast<int64_t>(config_.router().max_tokens_limit()) > longest() &&
        config_.router().max_tokens_limit() != INT32_MAX) {
      Add(Severity::kWarning, "router.max_tokens_limit",
          absl::StrCat(config_.router().max_tokens_limit(), " is more than the ", longest(), " tokens of the context"));
    }
  }

  // --- Experts ---

  void Experts() {
    if (!has_pool()) return;
    std::map<int, int> holders;
    for (int i = 0; i < config_.expert_size(); ++i) {
      const auto experts = WorkerConfig{config_, v1::ROLE_EXPERT, i}.ExpertsOf(model_.config.n_routed_experts);
      if (!experts.ok()) return;  // said already
      for (const int expert : *experts) ++holders[expert];
    }
    std::vector<std::string> missing;
    int single = 0;
    for (int expert = 0; expert < model_.config.n_routed_experts; ++expert) {
      if (holders[expert] == 0) missing.push_back(absl::StrCat(expert));
      single += holders[expert] == 1;
    }
    if (!missing.empty()) {
      const size_t count = missing.size();
      if (count > 8) missing.resize(8);
      Add(Severity::kError, "expert",
          absl::StrCat("no member has expert ", absl::StrJoin(missing, ", "), count > 8 ? " ..." : "", " of ",
                       model_.config.n_routed_experts, ": no worker would become ready"));
    } else if (single > 0) {
      Add(Severity::kNote, "expert",
          absl::StrCat(single, " of ", model_.config.n_routed_experts,
                       " experts have one holder: while that member restarts, requests wait"));
    }
  }

  // --- Addresses ---

  void Addresses() {
    const bool router_apart = !OnLoopback(config_.router().control_address());
    const auto check = [&](const char* role, int i, const v1::WorkerSection& worker) {
      if (router_apart && OnLoopback(worker.listen()) && worker.advertise().empty()) {
        Add(Severity::kWarning, Field(role, i, "worker.listen"),
            absl::StrCat(worker.listen(), " cannot be dialled from the router's machine (",
                         config_.router().control_address(), "): listen on 0.0.0.0, or set worker.advertise"));
      }
    };
    for (int i = 0; i < config_.prefill_size(); ++i) check("prefill", i, config_.prefill(i).worker());
    for (int i = 0; i < config_.decode_size(); ++i) check("decode", i, config_.decode(i).worker());
    for (int i = 0; i < config_.expert_size(); ++i) check("expert", i, config_.expert(i).worker());
  }

  const v1::ClusterConfig& config_;
  const ModelReport& model_;
  const MemoryBudget& memory_;
  const Numerics numerics_;
  const CacheLayout layout_;
  const Weights weights_;
  ConfigReport report_;
};

const char* Word(Severity severity) {
  return severity == Severity::kError ? "error" : severity == Severity::kWarning ? "warning" : "note";
}

}  // namespace

int ConfigReport::errors() const {
  return static_cast<int>(std::count_if(findings.begin(), findings.end(),
                                        [](const Finding& one) { return one.severity == Severity::kError; }));
}

ConfigReport CheckConfig(const v1::ClusterConfig& config, const ModelReport& model, const MemoryBudget& memory) {
  return Check(config, model, memory).Run();
}

bool RunsOnOneMachine(const v1::ClusterConfig& config) {
  const auto here = [](const v1::WorkerSection& worker) {
    return absl::StartsWith(worker.listen(), "127.") || absl::StartsWith(worker.listen(), "localhost:");
  };
  return std::all_of(config.prefill().begin(), config.prefill().end(), [&](auto& s) { return here(s.worker()); }) &&
         std::all_of(config.decode().begin(), config.decode().end(), [&](auto& s) { return here(s.worker()); }) &&
         std::all_of(config.expert().begin(), config.expert().end(), [&](auto& s) { return here(s.worker()); });
}

std::string ConfigReportText(const ConfigReport& report, const MemoryBudget& memory, bool colour) {
  std::string text = absl::StrFormat("%-20s %-9s %-4s %12s %12s %12s %12s %12s\n", "PROCESS", "ROLE", "ON", "WEIGHTS",
                                     "PAGES", "SLOTS", "BUFFERS *", "TOTAL");
  int64_t sum = 0;
  const auto bytes = [](int64_t n) { return n == 0 ? std::string("-") : HumanBytes(n); };
  for (const ProcessNeed& need : report.processes) {
    absl::StrAppendFormat(&text, "%-20s %-9s %-4s %12s %12s %12s %12s %12s\n", need.name, need.role,
                          need.on_gpu ? "gpu" : "cpu", bytes(need.weights), bytes(need.pages), bytes(need.slots),
                          bytes(need.buffers), HumanBytes(need.total()));
    if (!need.on_gpu) sum += need.total();
  }
  if (memory.one_machine)
    absl::StrAppendFormat(&text, "%-20s %-9s %-4s %64s\n", "together", "", "cpu", HumanBytes(sum));
  absl::StrAppend(&text, "* estimated: activations of one pass, the program itself\n");
  const auto limit = [&](const char* what, int64_t n, const std::string& is) {
    absl::StrAppend(&text, what, n > 0 ? absl::StrCat(HumanBytes(n), " (", is, ")") : absl::StrCat("not judged: ", is),
                    "\n");
  };
  limit(memory.one_machine ? "memory for all of them: " : "memory for each: ", memory.host, memory.host_is);
  if (std::any_of(report.processes.begin(), report.processes.end(), [](const auto& p) { return p.on_gpu; })) {
    limit("memory of each card: ", memory.gpu, memory.gpu_is);
  }
  absl::StrAppend(&text, "\n");
  for (const Finding& finding : report.findings) {
    const char* code = finding.severity == Severity::kError     ? "1;31"
                       : finding.severity == Severity::kWarning ? "33"
                                                                : "2";
    absl::StrAppend(&text, colour ? absl::StrCat("\033[", code, "m") : "", Word(finding.severity),
                    colour ? "\033[0m" : "", "  ", finding.field, ": ", finding.text, "\n");
  }
  return text;
}

nlohmann::ordered_json ConfigReportJson(const ConfigReport& report, const MemoryBudget& memory) {
  nlohmann::ordered_json processes = nlohmann::ordered_json::array(), findings = nlohmann::ordered_json::array();
  for (const ProcessNeed& need : report.processes) {
    processes.push_back({{"name", need.name},
                         {"role", need.role},
                         {"on", need.on_gpu ? "gpu" : "cpu"},
                         {"weight_bytes", need.weights},
                         {"page_bytes", need.pages},
                         {"slot_bytes", need.slots},
                         {"buffer_bytes", need.buffers},
                         {"total_bytes", need.total()}});
  }
  for (const Finding& finding : report.findings) {
    findings.push_back({{"severity", Word(finding.severity)}, {"field", finding.field}, {"text", finding.text}});
  }
  return {{"ok", report.errors() == 0},        {"host_bytes", memory.host},         {"gpu_bytes", memory.gpu},
          {"one_machine", memory.one_machine}, {"processes", std::move(processes)}, {"findings", std::move(findings)}};
}

}  // namespace millrace::cli
