// SPDX-License-Identifier: Apache-2.0
// Asynchronous gRPC calls to workers whose answers arrive on the loop.
//
// A channel and its stubs per worker incarnation, one-shot calls, and server streams that are read one message at a
// time: the next read starts when the loop has handled the last, so a stream holds at most one message here and a slow
// reader pushes back through gRPC's flow control. What is called when, and what an answer means, is request_flow.
//
// Thread: start and cancel from the loop; handlers run on the loop. Handlers must tolerate that what they belong to has
// ended meanwhile (they look it up by id).
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "grpcpp/grpcpp.h"
#include "millrace/v1/decode.grpc.pb.h"
#include "millrace/v1/handoff.grpc.pb.h"
#include "millrace/v1/prefill.grpc.pb.h"
#include "services/common/grpc_status.h"
#include "services/common/peer_security.h"
#include "services/router/cluster_snapshot.h"
#include "services/router/event_loop.h"

namespace millrace::router {

// How to reach one incarnation of one worker. Shared by the calls that use it, so that it outlives the worker's
// leaving.
struct WorkerPeer {
  WorkerPeer(const WorkerView& view, const PeerSecurity* security);  // null: plain
  std::string name;
  IncarnationId incarnation;
  std::string control_address;
  std::shared_ptr<grpc::Channel> channel;
  std::unique_ptr<v1::Prefill::Stub> prefill;
  std::unique_ptr<v1::Handoff::Stub> handoff;
  std::unique_ptr<v1::Decode::Stub> decode;
};

// Calls whose handlers have not run yet. The owner of the loop waits for zero before it stops the loop.
class CallCount {
 public:
  void Begin() { count_.fetch_add(1, std::memory_order_relaxed); }
  void End() { count_.fetch_sub(1, std::memory_order_release); }
  int64_t value() const { return count_.load(std::memory_order_acquire); }

 private:
  std::atomic<int64_t> count_{0};
};

std::chrono::system_clock::time_point GrpcDeadline(Duration from_now);

// One request, one answer. `start` is the stub's async method with its callback:
//   CallUnary<ReserveResponse>(loop, count, 3s, [&](auto* context, auto* response, auto done) { ... }, handler)
template <typename Response>
void CallUnary(EventLoop& loop, CallCount& count, Duration timeout,
               const std::function<void(grpc::ClientContext*, Response*, std::function<void(grpc::Status)>)>& start,
               absl::AnyInvocable<void(const absl::Status&, const Response&, TimePoint)> handler) {
  struct Call {
    grpc::ClientContext context;
    Response response;
    absl::AnyInvocable<void(const absl::Status&, const Response&, TimePoint)> handler;
  };
  auto call = std::make_shared<Call>();
  call->handler = std::move(handler);
  call->context.set_deadline(GrpcDeadline(timeout));
  count.Begin();
  start(&call->context, &call->response, [&loop, &count, call](const grpc::Status& status) {
    loop.Post([&count, call, status = FromGrpcStatus(status)](TimePoint now) {
      call->handler(status, call->response, now);
      count.End();
    });
  });
}

// One server stream. Keeps itself alive until gRPC is done with it.
template <typename Event>
class StreamCall final : public grpc::ClientReadReactor<Event>, public std::enable_shared_from_this<StreamCall<Event>> {
 public:
  using OnEvent = std::function<void(const Event&, TimePoint)>;
  using OnDoneHandler = std::function<void(const absl::Status&, TimePoint)>;

  StreamCall(EventLoop& loop, CallCount& count, OnEvent on_event, OnDoneHandler on_done)
      : loop_(loop), count_(count), on_event_(std::move(on_event)), on_done_(std::move(on_done)) {}

  // `bind` calls the stub's async method with context() and this.
  template <typename Bind>
  void Start(Duration timeout, Bind bind) {
    self_ = this->shared_from_this();
    count_.Begin();
    context_.set_deadline(GrpcDeadline(timeout));
    bind(&context_, this);
    // The loop starts reads outside of gRPC's callbacks, which needs a hold so that OnDone cannot overtake them.
    this->AddHold();
    holding_ = true;
    this->StartRead(&event_);
    this->StartCall();
  }

  void Cancel() { context_.TryCancel(); }

  // While paused no read is started; the one under way still arrives.
  void SetPaused(bool paused) {
    paused_ = paused;
    if (!paused_ && idle_) ReadNext();
  }

  void OnReadDone(bool ok) override {
    if (!ok) {
      loop_.Post([self = self_](TimePoint) { self->DropHold(); });
      return;
    }
    loop_.Post([self = self_](TimePoint now) {
      self->on_event_(self->event_, now);
      self->idle_ = true;
      if (!self->paused_) self->ReadNext();
    });
  }

  void OnDone(const grpc::Status& status) override {
    loop_.Post([self = std::move(self_), status = FromGrpcStatus(status)](TimePoint now) {
      self->on_done_(status, now);
      self->count_.End();
    });
  }

  // A paused stream reads nothing and so cannot see its own end: called when its owner ends.
  void Abandon() {
    Cancel();
    SetPaused(false);
  }

 private:
  void ReadNext() {
    idle_ = false;
    if (holding_) this->StartRead(&event_);
  }
  void DropHold() {
    if (!holding_) return;
    holding_ = false;
    this->RemoveHold();
  }

  EventLoop& loop_;
  CallCount& count_;
  const OnEvent on_event_;
  const OnDoneHandler on_done_;
  grpc::ClientContext context_;
  Event event_;
  std::shared_ptr<StreamCall> self_;  // from Start to OnDone
  bool holding_ = false, paused_ = false, idle_ = false;
};

}  // namespace millrace::router
