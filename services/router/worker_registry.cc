// SPDX-License-Identifier: Apache-2.0
// Membership: hello, ready, status, silence, replacement, and the expert list that follows from it.
#include "services/router/worker_registry.h"

#include <algorithm>
#include <string_view>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "engine/status.h"
#include "services/common/error.h"
#include "services/common/role.h"
#include "spdlog/spdlog.h"

namespace millrace::router {
namespace {

constexpr uint32_t kWireVersion = 1;
// A cluster of tens of workers is expected; a thousand is a mistake or an attack.
constexpr size_t kMaxMembers = 1024;

bool ValidName(const std::string& name) {
  if (name.empty() || name.size() > 128) return false;
  return std::all_of(name.begin(), name.end(),
                     [](char c) { return absl::ascii_isalnum(c) || c == '.' || c == '_' || c == '-'; });
}

// Enough of an incarnation to tell two apart in a log.
std::string Short(const IncarnationId& id) { return id.ToString().substr(0, 8); }

absl::Status Missing(const std::string& field, const std::string& expected) {
  return absl::InvalidArgumentError(absl::StrCat(field, ": expected ", expected));
}

absl::Status CheckReady(const v1::WorkerReady& ready, v1::Role role) {
  if (ready.expert_compat_hash().empty()) return Missing("ready.expert_compat_hash", "a hash");
  if (!ready.has_capacity()) return Missing("ready.capacity", "the worker's limits");
  if (role == v1::ROLE_EXPERT) {
    if (!ready.has_experts()) return Missing("ready.experts", "the share of a pool member");
    return absl::OkStatus();
  }
  if (ready.compat_hash().empty()) return Missing("ready.compat_hash", "a hash");
  const v1::Capacity& capacity = ready.capacity();
  if (capacity.page_tokens() == 0) return Missing("ready.capacity.page_tokens", "at least 1");
  if (capacity.slots_total() == 0) return Missing("ready.capacity.slots_total", "at least 1");
  if (capacity.max_context_tokens() == 0) return Missing("ready.capacity.max_context_tokens", "at least 1");
  return absl::OkStatus();
}

}  // namespace

WorkerRegistry::WorkerRegistry(RegistryOptions options) : options_(options) {
  CHECK(options_.dead_after >= 3 * options_.heartbeat,
        absl::StrCat("dead_after ", options_.dead_after.count(), " ms, heartbeat ", options_.heartbeat.count(), " ms"));
}

absl::Status WorkerRegistry::OnMessage(const std::shared_ptr<WorkerConnection>& connection,
                                       const v1::WorkerMessage& message, TimePoint now) {
  Member* member = FindConnection(connection.get());
  if (member == nullptr) {
    if (!message.has_hello()) return absl::InvalidArgumentError("message: expected hello first");
    return OnHello(connection, message.hello(), now);
  }
  WorkerView& view = member->view;
  view.last_heard = now;
  switch (message.message_case()) {
    case v1::WorkerMessage::kReady: {
      if (view.ready) return absl::InvalidArgumentError("ready: sent twice");
      RETURN_IF_ERROR(CheckReady(message.ready(), view.role));
      view.ready = true;
      view.serves = message.ready();
      spdlog::info("worker ready: {} {} incarnation {} compat {} kernel {}", RoleWord(view.role), view.name,
                   Short(view.incarnation), view.serves.compat_hash().substr(0, 12), view.serves.kernel_set());
      if (view.role == v1::ROLE_EXPERT) PublishPeers();
      if (on_change_) on_change_(now);
      return absl::OkStatus();
    }
    case v1::WorkerMessage::kStatus: {
      const bool served = view.Serving();
      view.status = message.status();
      v1::RouterMessage echo;
      echo.set_echo(message.status().beat());
      connection->Send(std::move(echo));
      // A member of the pool that drains finishes what it has but must not be given more.
      if (served != view.Serving() && view.role == v1::ROLE_EXPERT) PublishPeers();
      if (on_change_) on_change_(now);
      return absl::OkStatus();
    }
    case v1::WorkerMessage::kHello:
      return absl::InvalidArgumentError("hello: sent twice");
    case v1::WorkerMessage::MESSAGE_NOT_SET:
      return absl::InvalidArgumentError("message: expected one of hello, ready, status");
  }
  return absl::InvalidArgumentError("message: unknown");
}

absl::Status WorkerRegistry::OnHello(const std::shared_ptr<WorkerConnection>& connection, const v1::WorkerHello& hello,
                                     TimePoint now) {
  if (hello.wire_version() != kWireVersion) {
    return absl::FailedPreconditionError(
        absl::StrCat("hello.wire_version: found ", hello.wire_version(), ", this router speaks ", kWireVersion));
  }
  if (hello.role() != v1::ROLE_PREFILL && hello.role() != v1::ROLE_DECODE && hello.role() != v1::ROLE_EXPERT) {
    return Missing("hello.role", "PREFILL, DECODE or EXPERT");
  }
  if (!ValidName(hello.name())) {
    return Missing("hello.name", absl::StrCat("1 to 128 of [A-Za-z0-9._-], found ", QuoteInput(hello.name())));
  }
  const IncarnationId incarnation = IncarnationId::From(hello.incarnation());
  if (incarnation.empty()) return Missing("hello.incarnation", "a random 128-bit number");
  if (hello.control_address().empty()) return Missing("hello.control_address", "host:port");
  if (members_.size() >= kMaxMembers) {
    return absl::ResourceExhaustedError(absl::StrCat("this router accepts ", kMaxMembers, " workers"));
  }

  const Key key{hello.role(), hello.name()};
  if (auto old = members_.find(key); old != members_.end()) {
    // The newest wins: a worker that was restarted is there before the old stream's death is noticed. A twin that was
    // given the same name by mistake shows as two workers ousting each other in the log.
    old->second.connection->Close(
        absl::AbortedError(absl::StrCat("another incarnation of ", hello.name(), " joined: ", Short(incarnation))));
    Remove(old, "replaced by a newer incarnation", now);
  }
  Member& member = members_[key];
  member.connection = connection;
  WorkerView& view = member.view;
  view.role = hello.role();
  view.name = hello.name();
  view.incarnation = incarnation;
  view.control_address = hello.control_address();
  view.software = hello.software();
  view.joined = now;
  view.last_heard = now;
  ++joins_;
  spdlog::info("worker joined: {} {} at {} incarnation {}", RoleWord(view.role), view.name, view.control_address,
               Short(incarnation));

  v1::RouterMessage welcome;
  *welcome.mutable_welcome()->mutable_router() = options_.router.ToProto();
  welcome.mutable_welcome()->set_heartbeat_ms(static_cast<uint32_t>(options_.heartbeat.count()));
  welcome.mutable_welcome()->set_dead_after_ms(static_cast<uint32_t>(options_.dead_after.count()));
  connection->Send(std::move(welcome));
  if (view.role != v1::ROLE_EXPERT) connection->Send(PeersMessage());
  return absl::OkStatus();
}

void WorkerRegistry::OnDisconnected(const std::shared_ptr<WorkerConnection>& connection, TimePoint now) {
  for (auto it = members_.begin(); it != members_.end(); ++it) {
    if (it->second.connection == connection) {
      Remove(it, "its stream to the router broke", now);
      return;
    }
  }
}

void WorkerRegistry::Sweep(TimePoint now) {
  for (auto it = members_.begin(); it != members_.end();) {
    const auto member = it++;
    if (now - member->second.view.last_heard <= options_.dead_after) continue;
    member->second.connection->Close(
        absl::DeadlineExceededError(absl::StrCat("nothing heard for ", options_.dead_after.count(), " ms")));
    Remove(member, absl::StrCat("silent for ", options_.dead_after.count(), " ms"), now);
  }
}

void WorkerRegistry::Remove(std::map<Key, Member>::iterator member, const std::string& why, TimePoint now) {
  const WorkerView gone = member->second.view;
  members_.erase(member);
  ++deaths_;
  spdlog::warn("worker gone: {} {} incarnation {}: {}", RoleWord(gone.role), gone.name, Short(gone.incarnation), why);
  if (gone.role == v1::ROLE_EXPERT && gone.ready) PublishPeers();
  if (on_gone_) on_gone_(gone, why, now);
  if (on_change_) on_change_(now);
}

absl::Status WorkerRegistry::Drain(const std::string& name, const std::string& reason) {
  for (auto& [key, member] : members_) {
    if (member.view.name != name) continue;
    spdlog::info("asking {} {} to drain: {}", RoleWord(member.view.role), name, reason);
    v1::RouterMessage message;
    message.mutable_drain()->set_reason(reason);
    member.connection->Send(std::move(message));
    return absl::OkStatus();
  }
  return absl::NotFoundError(absl::StrCat("no worker ", name));
}

void WorkerRegistry::CloseAll(const std::string& reason) {
  for (auto& [key, member] : members_) member.connection->Close(absl::UnavailableError(reason));
  members_.clear();
}

WorkerRegistry::Member* WorkerRegistry::FindConnection(const WorkerConnection* connection) {
  for (auto& [key, member] : members_) {
    if (member.connection.get() == connection) return &member;
  }
  return nullptr;
}

void WorkerRegistry::PublishPeers() {
  ++peers_version_;
  const v1::RouterMessage message = PeersMessage();
  for (auto& [key, member] : members_) {
    if (member.view.role != v1::ROLE_EXPERT) member.connection->Send(message);
  }
}

v1::RouterMessage WorkerRegistry::PeersMessage() const {
  v1::RouterMessage message;
  v1::PeerList* peers = message.mutable_peers();
  peers->set_version(peers_version_);
  for (const auto& [key, member] : members_) {
    const WorkerView& view = member.view;
    if (view.role != v1::ROLE_EXPERT || !view.ready) continue;
    v1::ExpertPeer* peer = peers->add_experts();
    peer->set_draining(view.status.state() == v1::WORKER_STATE_DRAINING);
    peer->set_name(view.name);
    *peer->mutable_incarnation() = view.incarnation.ToProto();
    peer->set_control_address(view.control_address);
    peer->set_transfer_address(view.serves.transfer_address());
    peer->set_expert_compat_hash(view.serves.expert_compat_hash());
    *peer->mutable_share() = view.serves.experts();
  }
  return message;
}

ClusterSnapshot WorkerRegistry::Snapshot() const {
  ClusterSnapshot snapshot;
  snapshot.suspect_after = options_.suspect_after();
  snapshot.workers.reserve(members_.size());
  for (const auto& [key, member] : members_) snapshot.workers.push_back(member.view);
  return snapshot;
}

const WorkerView* WorkerRegistry::Find(const IncarnationId& incarnation) const {
  for (const auto& [key, member] : members_) {
    if (member.view.incarnation == incarnation) return &member.view;
  }
  return nullptr;
}

}  // namespace millrace::router
