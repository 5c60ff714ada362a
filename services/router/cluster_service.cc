// SPDX-License-Identifier: Apache-2.0
// One Join stream as a reactor.
//
// Writes are coalesced: only the newest echo and the newest peer list matter, so what can wait for a slow worker is
// bounded by one of each kind however slowly it reads.
#include "services/router/cluster_service.h"

#include <memory>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "services/common/grpc_status.h"

namespace millrace::router {
namespace {

class JoinReactor final : public grpc::ServerBidiReactor<v1::WorkerMessage, v1::RouterMessage>,
                          public WorkerConnection {
 public:
  // `proven`: the role that the caller's certificate is for; nothing: no certificate was asked for.
  JoinReactor(EventLoop& loop, WorkerRegistry& registry, std::optional<PeerRole> proven)
      : loop_(loop), registry_(registry), proven_(proven) {}

  // gRPC calls OnDone from its own threads while the registry may still hold us: the last of the two deletes.
  void Start(std::shared_ptr<JoinReactor> self) {
    self_ = std::move(self);
    StartRead(&incoming_);
  }

  void OnReadDone(bool ok) override {
    if (!ok) {  // the worker closed its side or the connection broke
      loop_.Post([this, self = self_](TimePoint now) { registry_.OnDisconnected(self, now); });
      Close(absl::OkStatus());
      return;
    }
    loop_.Post([this, self = self_](TimePoint now) {
      absl::Status status = CheckClaim();
      if (status.ok()) status = registry_.OnMessage(self, incoming_, now);
      if (!status.ok()) {
        registry_.OnDisconnected(self, now);
        Close(status);
        return;
      }
      StartNextRead();
    });
  }

  void OnWriteDone(bool ok) override {
    absl::MutexLock lock(&mutex_);
    writing_ = false;
    if (ok) WriteNext();
  }

  void OnCancel() override {
    loop_.Post([this, self = self_](TimePoint now) { registry_.OnDisconnected(self, now); });
    Close(absl::CancelledError("stream cancelled"));
  }

  void OnDone() override {
    loop_.Post([this, self = self_](TimePoint now) { registry_.OnDisconnected(self, now); });
    self_.reset();
  }

  void Send(v1::RouterMessage message) override {
    absl::MutexLock lock(&mutex_);
    if (finished_) return;
    switch (message.message_case()) {
      case v1::RouterMessage::kWelcome:
        welcome_ = std::move(message);
        break;
      case v1::RouterMessage::kEcho:
        echo_ = std::move(message);
        break;
      case v1::RouterMessage::kPeers:
        peers_ = std::move(message);
        break;
      case v1::RouterMessage::kDrain:
        drain_ = std::move(message);
        break;
      case v1::RouterMessage::MESSAGE_NOT_SET:
        return;
    }
    WriteNext();
  }

  void Close(absl::Status status) override {
    absl::MutexLock lock(&mutex_);
    if (finished_) return;
    finished_ = true;
    Finish(ToGrpcStatus(status));
  }

 private:
  // A worker that was broken into may say anything; its certificate says what it is.
  absl::Status CheckClaim() const {
    if (!proven_ || !incoming_.has_hello()) return absl::OkStatus();
    const v1::Role claimed = incoming_.hello().role();
    if (claimed != v1::ROLE_UNSPECIFIED && PeerRoleOf(claimed) == *proven_) return absl::OkStatus();
    return absl::PermissionDeniedError(
        absl::StrCat("hello.role: found ", v1::Role_Name(claimed), " with a certificate for ", PeerRoleWord(*proven_)));
  }

  void StartNextRead() {
    absl::MutexLock lock(&mutex_);
    if (!finished_) StartRead(&incoming_);
  }

  void WriteNext() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    if (writing_ || finished_) return;
    for (std::optional<v1::RouterMessage>* next : {&welcome_, &drain_, &peers_, &echo_}) {
      if (!next->has_value()) continue;
      outgoing_ = std::move(**next);
      next->reset();
      writing_ = true;
      StartWrite(&outgoing_);
      return;
    }
  }

  EventLoop& loop_;
  WorkerRegistry& registry_;
  const std::optional<PeerRole> proven_;
  std::shared_ptr<JoinReactor> self_;  // until OnDone
  v1::WorkerMessage incoming_;         // the reading side's: gRPC, then the loop, then gRPC again

  absl::Mutex mutex_;
  v1::RouterMessage outgoing_ ABSL_GUARDED_BY(mutex_);
  bool writing_ ABSL_GUARDED_BY(mutex_) = false;
  bool finished_ ABSL_GUARDED_BY(mutex_) = false;
  std::optional<v1::RouterMessage> welcome_ ABSL_GUARDED_BY(mutex_), drain_ ABSL_GUARDED_BY(mutex_),
      peers_ ABSL_GUARDED_BY(mutex_), echo_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace

grpc::ServerBidiReactor<v1::WorkerMessage, v1::RouterMessage>* ClusterService::Join(
    grpc::CallbackServerContext* context) {
  std::optional<PeerRole> proven;
  if (security_ != nullptr) proven = security_->RoleOf(*context->auth_context());  // the table let it in: it has one
  auto reactor = std::make_shared<JoinReactor>(loop_, registry_, proven);
  reactor->Start(reactor);
  return reactor.get();
}

}  // namespace millrace::router
