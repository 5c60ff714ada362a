// SPDX-License-Identifier: Apache-2.0
// Who has which expert: the pool as one prefill or decode worker sees it, attached and connected.
//
// The router's list says who there is. This attaches to each member (which checks the compatibility hash), opens the
// link, and gives the exchange a table expert -> member. A member whose link breaks or that does not answer drops out
// of the table at once and is attached again in the background for as long as the router lists it. One that drains
// leaves the table as soon as others have its experts, and is told so (Detach) when its last answer has come.
//
// Thread: any. One thread of its own makes the calls that wait.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "kvtransfer/transport.h"
#include "millrace/v1/cluster.pb.h"
#include "services/common/incarnation.h"
#include "services/expert/expert_link.h"

namespace millrace::expert {

// Links are taken out by the pool's own thread and die there: closing a stream waits for gRPC, which must not happen in
// one of its callbacks, where the last reference to a member may be dropped.
struct PoolMember {
  const v1::ExpertPeer info;
  std::atomic<bool> usable{false};
  std::atomic<bool> draining{false};
  std::atomic<int64_t> try_again_us{0};  // monotonic; a member that has just failed is left alone for a moment

  explicit PoolMember(v1::ExpertPeer i) : info(std::move(i)), draining(info.draining()) {}
  std::shared_ptr<ExpertLink> link() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return link_;
  }
  // Returns the link it had.
  [[nodiscard]] std::shared_ptr<ExpertLink> SetLink(std::shared_ptr<ExpertLink> link) {
    std::lock_guard<std::mutex> lock(mutex_);
    return std::exchange(link_, std::move(link));
  }

 private:
  mutable std::mutex mutex_;
  std::shared_ptr<ExpertLink> link_;  // null while not connected; guarded by mutex_
};

// Never changes once made; replaced as a whole.
struct PoolTable {
  struct Owner {
    std::shared_ptr<PoolMember> member;  // null: nobody has it
    int wave = 0;
  };
  std::vector<Owner> owners;  // by expert id
  int num_waves = 1;
};

struct ExpertPoolOptions {
  std::string name;           // of this worker
  IncarnationId incarnation;  // of this worker
  std::string expert_compat_hash;
  int num_experts = 0;
  std::vector<int> local_experts;  // run by this worker itself
  bool over_grpc = false;          // transfer.expert_transport is "grpc"
  absl::Duration attach_timeout = absl::Seconds(1);
  std::function<void()> on_change;  // the table is another one; called from any thread, must not block
};

class ExpertPool {
 public:
  // A reply of some member: from the transport it came with `from`, from a stream with the member itself.
  using OnFrame = std::function<void(PoolMember* member, absl::string_view frame)>;

  // `transport` may be null if over_grpc. Both must outlive the pool.
  ExpertPool(ExpertPoolOptions options, kvtransfer::Transport* transport, ChannelPool& channels, OnFrame on_frame);
  ~ExpertPool();

  void SetPeers(const v1::PeerList& peers);
  // OK when every expert is here or at a usable member; else which one is missing and why.
  absl::Status Ready() const;
  std::shared_ptr<const PoolTable> table() const;
  // The member failed: out of the table until it can be attached again.
  void MarkFailed(PoolMember* member, const absl::Status& why);

 private:
  void Run();
  absl::Status Connect(PoolMember& member);
  void Detach(const PoolMember& member);
  void Rebuild();  // mutex_ held

  const ExpertPoolOptions options_;
  kvtransfer::Transport* const transport_;
  ChannelPool& channels_;
  const OnFrame on_frame_;
  // Shared with the transport's failure callback, which cannot be taken back.
  struct PeerFailures;
  const std::shared_ptr<PeerFailures> peer_failures_;

  mutable std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<std::shared_ptr<PoolMember>> members_;  // guarded by mutex_, as all below
  std::vector<std::shared_ptr<PoolMember>> retired_;  // links to be closed by the pool's own thread
  std::shared_ptr<const PoolTable> table_;
  std::string last_failure_;
  bool changed_ = false, stop_ = false;  // changed: there is something for the thread to do
  std::thread thread_;
};

}  // namespace millrace::expert
