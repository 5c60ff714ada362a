// SPDX-License-Identifier: Apache-2.0
// ExpertExchange over the wire: splits the rows of one MoE layer among the pool, and puts what comes back in place.
//
// Dispatch packs and sends wave by wave: the members compute the first wave while the next is being packed and travels.
// Combine computes this worker's own experts (if it has any) meanwhile, waits within a bound, proves each reply and
// writes each (token, expert) row to its place in the batch's order, which is ascending by expert. A reply that is
// late, repeated or of another batch is dropped. A member that is lost or late fails the batch by name; nothing is
// skipped.
//
// Thread: Dispatch and Combine on the engine thread; replies arrive on the transport's or gRPC's.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "engine/moe/expert_exchange.h"
#include "kvtransfer/transport.h"
#include "services/expert/expert_pool.h"
#include "services/expert/expert_wire.h"

namespace millrace::expert {

struct RemoteExpertsOptions {
  ExpertPoolOptions pool;
  RowFormat format = RowFormat::kBf16;        // on the wire
  std::string kernel_set;                     // the pool's, which this worker's own experts share
  absl::Duration timeout = absl::Seconds(1);  // for one layer's rows
};

struct RemoteExpertsStatistics {
  uint64_t batches = 0, pieces = 0, bytes_sent = 0, bytes_received = 0;
  uint64_t dropped_replies = 0, failed_batches = 0;
  absl::Duration waited;  // of the engine thread, for replies
};

class RemoteExperts final : public ExpertExchange, public kvtransfer::MessageHandler {
 public:
  // `transport` may be null if pool.over_grpc; `local` holds pool.local_experts and may be null if there are none.
  RemoteExperts(RemoteExpertsOptions options, kvtransfer::Transport* transport, ChannelPool& channels,
                ExpertComputer* local);
  ~RemoteExperts() override;

  void SetPeers(const v1::PeerList& peers) { pool_->SetPeers(peers); }
  absl::Status Ready() const { return pool_->Ready(); }

  absl::Status Dispatch(const ExpertBatch& batch) override;
  absl::Status Combine(void* expert_rows) override;
  std::string KernelSet() const override { return options_.kernel_set; }

  RemoteExpertsStatistics statistics() const;
  kvtransfer::Placement OnMessage(const kvtransfer::IncomingMessage& message) override;

 private:
  struct Piece;
  struct Batch;

  absl::Status SplitByOwner(const ExpertBatch& batch, const PoolTable& table);
  absl::Status SendWaves(const ExpertBatch& batch);
  absl::Status SendPiece(const ExpertBatch& batch, const std::shared_ptr<PoolMember>& member, int wave,
                         const std::vector<std::pair<int, std::vector<uint32_t>>>& experts);
  absl::Status ComputeLocal(const ExpertBatch& batch, uint8_t* expert_rows);
  absl::Status Await(Batch& batch);
  absl::Status Scatter(Batch& batch, uint8_t* expert_rows);
  absl::Status FailBatch(absl::Status why);
  // The piece a reply belongs to, claimed for it; null (and a reason): drop it.
  Piece* Claim(const std::shared_ptr<Batch>& batch, const ExpertHeader& header, const PoolMember* member,
               kvtransfer::PeerId from, const char** reason);
  void OnFrame(PoolMember* member, absl::string_view frame);
  std::shared_ptr<Batch> current() const;

  const RemoteExpertsOptions options_;
  kvtransfer::Transport* const transport_;
  ExpertComputer* const local_;

  mutable std::mutex mutex_;
  std::condition_variable arrived_;  // for waits without a transport
  std::shared_ptr<Batch> current_;   // guarded by mutex_
  uint64_t next_batch_ = 1;
  std::atomic<uint64_t> pieces_{0}, bytes_sent_{0}, bytes_received_{0}, dropped_{0}, failed_{0};
  std::atomic<uint64_t> batches_{0};
  std::atomic<int64_t> waited_us_{0};

  // Engine thread only; kept from batch to batch.
  struct Share {  // of one member or of this worker, for the batch being dispatched
    std::shared_ptr<PoolMember> member;
    std::vector<std::pair<int, std::vector<uint32_t>>> by_expert;  // ascending expert; places in the batch
  };
  std::vector<std::vector<Share>> waves_;  // [wave][member]
  struct Own {  // pairs of the experts that this worker runs itself, as ExpertPairs wants them
    std::vector<ExpertGroup> groups;
    std::vector<uint32_t> places, rows;
    std::vector<float> weights;
    std::vector<uint8_t> out;
  } own_;
  std::vector<int32_t> row_of_token_;

  std::unique_ptr<ExpertPool> pool_;  // last: its thread calls back
};

}  // namespace millrace::expert
