// SPDX-License-Identifier: Apache-2.0
// See cluster_status.h.
#include "services/router/cluster_status.h"

#include <string>
#include <utility>

#include "services/common/role.h"

namespace millrace::router {
namespace {

using std::chrono::milliseconds;

const char* StateWord(const WorkerView& worker) {
  switch (worker.status.state()) {
    case v1::WORKER_STATE_READY:
      return worker.ready ? "ready" : "loading";
    case v1::WORKER_STATE_DRAINING:
      return "draining";
    case v1::WORKER_STATE_WAITING:
      return "waiting";
    default:
      return "loading";
  }
}

Json ExpertsJson(const v1::ExpertShare& share) {
  Json experts = Json::array();
  for (const uint32_t expert : share.experts()) experts.push_back(expert);
  return experts;
}

}  // namespace

Json CacheJson(const CacheLayout& layout) {
  int64_t csa = 0, keys = 0, hca = 0;
  const int64_t entry = layout.entry.body_bytes + layout.entry.scale_bytes;
  const int64_t key = layout.index_key.body_bytes + layout.index_key.scale_bytes;
  for (const PageLayerLayout& layer : layout.page_layers) {
    if (layer.kind == LayerKind::kCsa) {
      csa += layer.entries * entry;
      keys += layer.entries * key;
    } else if (layer.kind == LayerKind::kHca) {
      hca += layer.entries * entry;
    }
  }
  Json families = Json::array();
  for (const auto& [name, bytes] : {std::pair<const char*, int64_t>{"CSA entries", csa},
                                    {"index keys", keys},
                                    {"HCA entries", hca},
                                    {"alignment", layout.page_bytes - csa - keys - hca}}) {
    families.push_back(Json{{"name", name}, {"bytes", bytes}});
  }
  return Json{{"page_tokens", kPageTokens},
              {"page_bytes", layout.page_bytes},
              {"slot_bytes", layout.slot_bytes},
              {"families", std::move(families)}};
}

Json WorkersJson(const ClusterSnapshot& snapshot, std::chrono::steady_clock::time_point now) {
  Json workers = Json::array();
  const auto ms = [&](std::chrono::steady_clock::time_point then) {
    return std::chrono::duration_cast<milliseconds>(now - then).count();
  };
  for (const WorkerView& worker : snapshot.workers) {
    workers.push_back(Json{{"role", RoleWord(worker.role)},
                           {"name", worker.name},
                           {"incarnation", worker.incarnation.ToString()},
                           {"address", worker.control_address},
                           {"software", worker.software},
                           {"state", StateWord(worker)},
                           {"detail", worker.status.detail()},
                           {"suspect", now - worker.last_heard > snapshot.suspect_after},
                           {"up_ms", ms(worker.joined)},
                           {"heard_ms_ago", ms(worker.last_heard)},
                           {"load_bytes_done", worker.status.load_bytes_done()},
                           {"load_bytes_total", worker.status.load_bytes_total()},
                           {"compat_hash", worker.serves.compat_hash()},
                           {"kernel_set", worker.serves.kernel_set()},
                           {"experts", ExpertsJson(worker.serves.experts())},
                           {"running", worker.status.running()},
                           {"queued", worker.status.queued()},
                           {"queued_tokens", worker.status.queued_tokens()},
                           {"leased", worker.status.leased()},
                           {"pages_free", worker.status.pages_free()},
                           {"pages_total", worker.serves.capacity().pages_total()},
                           {"slots_free", worker.status.slots_free()},
                           {"slots_total", worker.serves.capacity().slots_total()},
                           {"steps", worker.status.steps()},
                           {"last_step_us", worker.status.last_step_us()},
                           {"tokens_total", worker.status.tokens_total()},
                           {"assigned_requests", worker.assigned.requests},
                           {"assigned_pages", worker.assigned.pages},
                           {"assigned_prompt_tokens", worker.assigned.prompt_tokens}});
  }
  return workers;
}

}  // namespace millrace::router
