// SPDX-License-Identifier: Apache-2.0
// A prefill and a decode worker without engines, for tests of what the router asks of them.
//
// They speak real gRPC, draw scripted tokens (token i of any request has id 100 + i), and keep account of what they
// hold, so that a test can say "nothing is left". A script says where they fail, wait or repeat themselves.
#pragma once

#include <grpcpp/grpcpp.h>

#include <algorithm>
#include <chrono>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "millrace/v1/decode.grpc.pb.h"
#include "millrace/v1/handoff.grpc.pb.h"
#include "millrace/v1/prefill.grpc.pb.h"
#include "services/common/grpc_status.h"
#include "services/router/cluster_snapshot.h"

namespace millrace::router {

// What the fakes do; change it between requests, or under its mutex.
struct Script {
  absl::Mutex mutex;
  std::vector<absl::Status> reserve_refusals;  // one per Reserve, front first; then grants
  absl::Status prefill_refusal;                // instead of anything
  absl::Status prefill_error_after_first;      // after token 0
  absl::Status decode_error;                   // after decode_error_at tokens in all
  uint64_t decode_error_at = 0;
  bool ends_at_prefill = false;  // token 0 is an end id
  bool hold_prefill = false;     // never draws token 0
  bool hold_commit = false;      // token 0, then nothing
  bool hold_decode = false;      // stops after decode_error_at tokens
  uint64_t repeat_index = 0;     // sends this index twice; 0: none
  uint64_t skip_index = 0;       // leaves this index out; 0: none
  int abort_failures = 0;        // that many Abort calls answer UNAVAILABLE first
};

inline v1::Token FakeToken(uint64_t index) {
  v1::Token token;
  token.set_index(index);
  token.set_id(static_cast<uint32_t>(100 + index));
  token.set_logprob(-0.5f * static_cast<float>(index));
  return token;
}

inline grpc::Status FakeStatus(const absl::Status& status) { return ToGrpcStatus(status); }

// Handoff and Decode of one fake decode worker, and Prefill of one fake prefill worker, in one server each.
class FakeDecode final : public v1::Handoff::Service, public v1::Decode::Service {
 public:
  explicit FakeDecode(Script& script, IncarnationId self) : script_(script), self_(self) {}

  grpc::Status Reserve(grpc::ServerContext*, const v1::ReserveRequest* request,
                       v1::ReserveResponse* response) override {
    absl::MutexLock lock(&script_.mutex);
    if (!script_.reserve_refusals.empty()) {
      const absl::Status refusal = script_.reserve_refusals.front();
      script_.reserve_refusals.erase(script_.reserve_refusals.begin());
      return FakeStatus(refusal);
    }
    const uint64_t id = next_lease_++;
    leases_[id] = request->spec();
    response->mutable_lease()->set_id(id);
    response->mutable_lease()->set_epoch(id + 1000);
    *response->mutable_lease()->mutable_owner() = self_.ToProto();
    response->set_ttl_ms(request->ttl_ms());
    response->set_transfer_address("nowhere");
    return grpc::Status::OK;
  }
  grpc::Status Renew(grpc::ServerContext*, const v1::RenewRequest* request, v1::RenewResponse* response) override {
    absl::MutexLock lock(&script_.mutex);
    ++renewals_;
    if (leases_.count(request->lease().id()) == 0) return {grpc::StatusCode::NOT_FOUND, "no such lease"};
    response->set_ttl_ms(request->ttl_ms());
    return grpc::Status::OK;
  }
  grpc::Status Abort(grpc::ServerContext*, const v1::AbortLeaseRequest* request,
                     v1::AbortLeaseResponse* response) override {
    absl::MutexLock lock(&script_.mutex);
    if (script_.abort_failures > 0) {
      --script_.abort_failures;
      return {grpc::StatusCode::UNAVAILABLE, "try again"};
    }
    response->set_was_live(leases_.erase(request->lease().id()) > 0);
    return grpc::Status::OK;
  }
  grpc::Status Release(grpc::ServerContext*, const v1::ReleaseRequest* request, v1::ReleaseResponse*) override {
    absl::MutexLock lock(&script_.mutex);
    leases_.erase(request->lease().id());
    return grpc::Status::OK;
  }

  // What prefill's Commit would do.
  void Commit(uint64_t lease) {
    absl::MutexLock lock(&script_.mutex);
    if (leases_.count(lease) > 0) committed_.insert(lease);
  }
  void AbortQuietly(uint64_t lease) {
    absl::MutexLock lock(&script_.mutex);
    leases_.erase(lease);
  }

  grpc::Status Decode(grpc::ServerContext* context, const v1::DecodeRequest* request,
                      grpc::ServerWriter<v1::DecodeEvent>* writer) override {
    const uint64_t lease = request->lease().id();
    v1::GenerationSpec spec;
    while (true) {
      if (context->IsCancelled()) return Cancelled(lease);
      absl::MutexLock lock(&script_.mutex);
      const auto found = leases_.find(lease);
      if (found == leases_.end()) return {grpc::StatusCode::ABORTED, "the lease was aborted"};
      spec = found->second;
      const auto committed = [&]() ABSL_SHARED_LOCKS_REQUIRED(script_.mutex) {
        return committed_.count(lease) > 0 || leases_.count(lease) == 0;
      };
      script_.mutex.AwaitWithTimeout(absl::Condition(&committed), absl::Milliseconds(5));
      if (committed_.count(lease) > 0) break;
    }
    for (uint64_t index = 1; index < spec.max_tokens(); ++index) {
      uint64_t repeat = 0;
      while (true) {
        if (context->IsCancelled()) return Cancelled(lease);
        absl::MutexLock lock(&script_.mutex);
        if (leases_.count(lease) == 0) return {grpc::StatusCode::ABORTED, "the lease was aborted"};
        repeat = script_.repeat_index;
        if (script_.decode_error_at == 0 || index < script_.decode_error_at) break;
        if (!script_.decode_error.ok()) {
          leases_.erase(lease);
          return FakeStatus(script_.decode_error);
        }
        if (!script_.hold_decode) break;
        const auto go = [&]() ABSL_SHARED_LOCKS_REQUIRED(script_.mutex) { return !script_.hold_decode; };
        script_.mutex.AwaitWithTimeout(absl::Condition(&go), absl::Milliseconds(5));
      }
      v1::DecodeEvent event;
      {
        absl::MutexLock lock(&script_.mutex);
        if (index == script_.skip_index) continue;
      }
      *event.mutable_tokens()->add_tokens() = FakeToken(index);
      if (index == repeat) *event.mutable_tokens()->add_tokens() = FakeToken(index);
      if (!writer->Write(event)) return Cancelled(lease);
    }
    v1::DecodeEvent end;
    end.mutable_end()->set_reason(v1::FINISH_REASON_LENGTH);
    end.mutable_end()->set_tokens(spec.max_tokens());
    writer->Write(end);
    return grpc::Status::OK;
  }

  int live_leases() {
    absl::MutexLock lock(&script_.mutex);
    return static_cast<int>(leases_.size());
  }
  int renewals() {
    absl::MutexLock lock(&script_.mutex);
    return renewals_;
  }

 private:
  grpc::Status Cancelled(uint64_t lease) {
    AbortQuietly(lease);
    return {grpc::StatusCode::CANCELLED, ""};
  }

  Script& script_;
  const IncarnationId self_;
  std::map<uint64_t, v1::GenerationSpec> leases_;  // guarded by script_.mutex, as all below
  std::set<uint64_t> committed_;
  uint64_t next_lease_ = 1;
  int renewals_ = 0;
};

class FakePrefill final : public v1::Prefill::Service {
 public:
  FakePrefill(Script& script, FakeDecode& decode) : script_(script), decode_(decode) {}

  grpc::Status Prefill(grpc::ServerContext* context, const v1::PrefillRequest* request,
                       grpc::ServerWriter<v1::PrefillEvent>* writer) override {
    const std::string key = request->request_id() + "/" + std::to_string(request->attempt());
    const uint64_t lease = request->target().lease().id();
    absl::Status refusal, error;
    bool ends = false;
    {
      absl::MutexLock lock(&script_.mutex);
      refusal = script_.prefill_refusal;
      error = script_.prefill_error_after_first;
      ends = script_.ends_at_prefill;
      if (refusal.ok()) live_.insert(key);
    }
    if (!refusal.ok()) return FakeStatus(refusal);
    v1::PrefillEvent event;
    event.mutable_accepted();
    writer->Write(event);
    if (!Wait(context, key, &Script::hold_prefill)) return End(key, {grpc::StatusCode::CANCELLED, ""});
    *event.mutable_first_token()->mutable_token() = FakeToken(0);
    if (ends) event.mutable_first_token()->set_finish(v1::FINISH_REASON_STOP);
    writer->Write(event);
    if (ends) {
      decode_.AbortQuietly(lease);
      event.mutable_ended()->set_reason(v1::FINISH_REASON_STOP);
      writer->Write(event);
      return End(key, grpc::Status::OK);
    }
    if (!error.ok()) return End(key, FakeStatus(error));
    if (!Wait(context, key, &Script::hold_commit)) return End(key, {grpc::StatusCode::CANCELLED, ""});
    decode_.Commit(lease);
    event.mutable_committed()->set_bytes(4096);
    writer->Write(event);
    return End(key, grpc::Status::OK);
  }
  grpc::Status Abort(grpc::ServerContext*, const v1::AbortPrefillRequest* request,
                     v1::AbortPrefillResponse* response) override {
    absl::MutexLock lock(&script_.mutex);
    if (script_.abort_failures > 0) {
      --script_.abort_failures;
      return {grpc::StatusCode::UNAVAILABLE, "try again"};
    }
    response->set_was_live(live_.erase(request->request_id() + "/" + std::to_string(request->attempt())) > 0);
    return grpc::Status::OK;
  }
  int live_prompts() {
    absl::MutexLock lock(&script_.mutex);
    return static_cast<int>(live_.size());
  }

 private:
  // False: cancelled or aborted.
  bool Wait(grpc::ServerContext* context, const std::string& key, bool Script::*hold) {
    while (true) {
      if (context->IsCancelled()) return false;
      absl::MutexLock lock(&script_.mutex);
      if (live_.count(key) == 0) return false;
      if (!(script_.*hold)) return true;
      const auto go = [&]() ABSL_SHARED_LOCKS_REQUIRED(script_.mutex) { return !(script_.*hold); };
      script_.mutex.AwaitWithTimeout(absl::Condition(&go), absl::Milliseconds(5));
    }
  }
  grpc::Status End(const std::string& key, grpc::Status status) {
    absl::MutexLock lock(&script_.mutex);
    live_.erase(key);
    return status;
  }

  Script& script_;
  FakeDecode& decode_;
  std::set<std::string> live_;  // guarded by script_.mutex
};

}  // namespace millrace::router
