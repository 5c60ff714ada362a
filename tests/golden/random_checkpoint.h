// SPDX-License-Identifier: Apache-2.0
// Checkpoints made of numbers anybody can make again.
//
// Golden vectors of a random model need its weights, and weights are megabytes (a head is 512 wide however small the
// model). So none are stored: a golden.json lists tensors and a rule for each, and every weight is an integer function
// of (seed, tensor name, index) that lands exactly on BF16 or F32. random_configs.py has the same function in numpy;
// it made the goldens from the same bits.
#pragma once

#include <string>

namespace millrace::golden {

// Writes config.json and model.safetensors into `model_dir` (created) as `data_dir`/config.json and
// `data_dir`/golden.json say. CHECK-fails: both directories are the test's own.
void WriteRandomCheckpoint(const std::string& data_dir, const std::string& model_dir);

}  // namespace millrace::golden
