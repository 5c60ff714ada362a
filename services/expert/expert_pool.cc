// SPDX-License-Identifier: Apache-2.0
// See expert_pool.h.
#include "services/expert/expert_pool.h"

#include <grpcpp/client_context.h>

#include <algorithm>
#include <chrono>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/status.h"
#include "millrace/v1/expert.grpc.pb.h"
#include "services/common/clock.h"
#include "services/common/grpc_status.h"
#include "spdlog/spdlog.h"

namespace millrace::expert {
namespace {

constexpr absl::Duration kReattach = absl::Milliseconds(200);
constexpr absl::Duration kLeavingPoll = absl::Milliseconds(20);  // of what still refers to a member that drains
constexpr absl::Duration kDetachTimeout = absl::Milliseconds(500);

}  // namespace

struct ExpertPool::PeerFailures {
  std::mutex mutex;
  ExpertPool* pool = nullptr;  // null once the pool is gone
};

ExpertPool::ExpertPool(ExpertPoolOptions options, kvtransfer::Transport* transport, ChannelPool& channels,
                       OnFrame on_frame)
    : options_(std::move(options)),
      transport_(transport),
      channels_(channels),
      on_frame_(std::move(on_frame)),
      peer_failures_(std::make_shared<PeerFailures>()) {
  peer_failures_->pool = this;
  if (transport_ != nullptr) {
    transport_->OnPeerFailed([failures = peer_failures_](kvtransfer::PeerId peer, const absl::Status& why) {
      std::lock_guard<std::mutex> lock(failures->mutex);
      if (failures->pool == nullptr) return;
      std::vector<std::shared_ptr<PoolMember>> members;
      {
        std::lock_guard<std::mutex> pool_lock(failures->pool->mutex_);
        members = failures->pool->members_;
      }
      for (const auto& member : members) {
        const std::shared_ptr<ExpertLink> link = member->link();
        if (member->usable.load() && link != nullptr && link->peer() == peer) {
          failures->pool->MarkFailed(member.get(), why);
        }
      }
    });
  }
  Rebuild();
  thread_ = std::thread([this] { Run(); });
}

ExpertPool::~ExpertPool() {
  {
    std::lock_guard<std::mutex> lock(peer_failures_->mutex);
    peer_failures_->pool = nullptr;
  }
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  thread_.join();
}

void ExpertPool::SetPeers(const v1::PeerList& peers) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    std::vector<std::shared_ptr<PoolMember>> next;
    for (const v1::ExpertPeer& info : peers.experts()) {
      const auto same = std::find_if(members_.begin(), members_.end(), [&](const auto& member) {
        return IncarnationId::From(member->info.incarnation()) == IncarnationId::From(info.incarnation());
      });
      if (same != members_.end()) {
        (*same)->draining.store(info.draining());
        next.push_back(*same);
        continue;
      }
      next.push_back(std::make_shared<PoolMember>(info));
    }
    for (const auto& member : members_) {
      if (std::find(next.begin(), next.end(), member) != next.end()) continue;
      member->usable.store(false);
      retired_.push_back(member);
    }
    members_ = std::move(next);
    changed_ = true;
    Rebuild();
  }
  wake_.notify_all();
  if (options_.on_change) options_.on_change();
}

void ExpertPool::MarkFailed(PoolMember* member, const absl::Status& why) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!member->usable.exchange(false)) return;
    member->try_again_us.store(ToMicros(MonotonicNow() + kReattach));
    last_failure_ = absl::StrCat(member->info.name(), ": ", why.message());
    changed_ = true;
    Rebuild();
  }
  spdlog::warn("expert worker lost: {}: {}", member->info.name(), std::string(why.message()));
  wake_.notify_all();
  if (options_.on_change) options_.on_change();
}

std::shared_ptr<const PoolTable> ExpertPool::table() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return table_;
}

absl::Status ExpertPool::Ready() const {
  std::lock_guard<std::mutex> lock(mutex_);
  for (int e = 0; e < options_.num_experts; ++e) {
    const PoolMember* const owner = table_->owners[e].member.get();
    if (owner != nullptr && !owner->draining.load()) continue;
    if (std::find(options_.local_experts.begin(), options_.local_experts.end(), e) != options_.local_experts.end()) {
      continue;
    }
    if (owner != nullptr) {  // enough for what runs, not for what is still to come
      return absl::UnavailableError(absl::StrCat("expert ", e, " is only at ", owner->info.name(), ", which drains"));
    }
    return absl::UnavailableError(absl::StrCat("expert ", e, " is at no member of the pool",
                                               last_failure_.empty() ? "" : ", last loss: ", last_failure_));
  }
  return absl::OkStatus();
}

void ExpertPool::Rebuild() {
  auto table = std::make_shared<PoolTable>();
  table->owners.resize(static_cast<size_t>(options_.num_experts));
  for (int e = 0; e < options_.num_experts; ++e) {
    std::vector<PoolTable::Owner> replicas, leaving;
    for (const auto& member : members_) {
      if (!member->usable.load()) continue;
      const auto& experts = member->info.share().experts();
      const auto at = std::lower_bound(experts.begin(), experts.end(), static_cast<uint32_t>(e));
      if (at == experts.end() || *at != static_cast<uint32_t>(e)) continue;
      const int waves = std::max(1, static_cast<int>(member->info.share().waves()));
      (member->draining.load() ? leaving : replicas)
          .push_back({member, static_cast<int>((at - experts.begin()) * waves / experts.size())});
    }
    if (replicas.empty()) replicas = std::move(leaving);
    if (replicas.empty()) continue;
    // Replicas share the experts among them; which one computes never changes the bits.
    table->owners[e] = replicas[static_cast<size_t>(e) % replicas.size()];
    table->num_waves = std::max(table->num_waves, table->owners[e].wave + 1);
  }
  table_ = std::move(table);
}

void ExpertPool::Run() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (!stop_) {
    std::vector<std::shared_ptr<PoolMember>> wanted = members_;
    std::vector<std::shared_ptr<PoolMember>> retired = std::exchange(retired_, {});
    changed_ = false;
    lock.unlock();
    for (const auto& member : retired) (void)member->SetLink(nullptr);  // may wait for gRPC, so not under the lock
    bool all = true, any_new = false, leaving = false;
    for (auto& member : wanted) {
      if (member->draining.load()) {
        if (!member->usable.load()) continue;
        // Ours and the list's are the last references: no table sends to it, no batch waits for it.
        if (member.use_count() > 2) {
          leaving = true;
          continue;
        }
        member->usable.store(false);
        Detach(*member);
        (void)member->SetLink(nullptr);
        continue;
      }
      if (member->usable.load()) continue;
      if (ToMicros(MonotonicNow()) < member->try_again_us.load()) {
        all = false;
        continue;
      }
      const absl::Status connected = Connect(*member);
      if (connected.ok()) {
        any_new = true;
        spdlog::info("expert worker attached: {} with {} experts", member->info.name(),
                     member->info.share().experts_size());
      } else {
        all = false;
        lock.lock();
        last_failure_ = absl::StrCat(member->info.name(), ": ", connected.message());
        lock.unlock();
      }
    }
    lock.lock();
    if (any_new) {
      Rebuild();
      lock.unlock();
      if (options_.on_change) options_.on_change();
      lock.lock();
    }
    const auto news = [this] { return stop_ || changed_; };
    wanted.clear();
    if (leaving) {
      wake_.wait_for(lock, absl::ToChronoMilliseconds(kLeavingPoll), news);
    } else if (all) {
      wake_.wait(lock, news);
    } else {
      wake_.wait_for(lock, absl::ToChronoMilliseconds(kReattach), news);
    }
  }
  std::vector<std::shared_ptr<PoolMember>> left = std::move(members_);
  left.insert(left.end(), retired_.begin(), retired_.end());
  retired_.clear();
  lock.unlock();
  for (const auto& member : left) {
    if (member->usable.exchange(false)) Detach(*member);
    (void)member->SetLink(nullptr);
  }
}

// Best effort: a member that does not hear it waits until we have been silent for long enough.
void ExpertPool::Detach(const PoolMember& member) {
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + absl::ToChronoMicroseconds(kDetachTimeout));
  v1::DetachRequest request;
  options_.incarnation.To(request.mutable_caller());
  v1::DetachResponse response;
  (void)v1::Expert::NewStub(channels_.Get(member.info.control_address(), PeerRole::kExpert))
      ->Detach(&context, request, &response);
}

absl::Status ExpertPool::Connect(PoolMember& member) {
  if (member.info.expert_compat_hash() != options_.expert_compat_hash) {
    return absl::FailedPreconditionError(absl::StrCat("incompatible_peer: expert_compat_hash ",
                                                      member.info.expert_compat_hash(), ", ours is ",
                                                      options_.expert_compat_hash));
  }
  if (!options_.over_grpc && (transport_ == nullptr || member.info.transfer_address().empty())) {
    return absl::FailedPreconditionError("has no transfer address: use expert_transport grpc");
  }
  const auto channel = channels_.Get(member.info.control_address(), PeerRole::kExpert);
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + absl::ToChronoMicroseconds(options_.attach_timeout));
  v1::AttachRequest request;
  request.set_name(options_.name);
  options_.incarnation.To(request.mutable_caller());
  if (transport_ != nullptr && !options_.over_grpc) request.set_transfer_address(transport_->address());
  request.set_expert_compat_hash(options_.expert_compat_hash);
  v1::AttachResponse response;
  RETURN_IF_ERROR(FromGrpcStatus(v1::Expert::NewStub(channel)->Attach(&context, request, &response)));
  if (IncarnationId::From(response.member()) != IncarnationId::From(member.info.incarnation())) {
    return absl::UnavailableError("another incarnation answers at its address");
  }
  std::shared_ptr<ExpertLink> link;
  PoolMember* const raw = &member;
  if (options_.over_grpc) {
    link = MakeStreamLink(
        channel, [this, raw](absl::string_view frame) { on_frame_(raw, frame); },
        [this, raw](const absl::Status& why) { MarkFailed(raw, why); });
  } else {
    ASSIGN_OR_RETURN(const kvtransfer::PeerId peer, transport_->Connect(member.info.transfer_address()));
    link = MakeTransportLink(*transport_, peer);
  }
  const std::shared_ptr<ExpertLink> old = member.SetLink(std::move(link));
  member.usable.store(true);
  return absl::OkStatus();
}

}  // namespace millrace::expert
