// SPDX-License-Identifier: Apache-2.0
// The released config.json texts, whole or cut down, for tests, `inspect` by name and random checkpoints.
//
// A cut-down model keeps every dimension of its layers and drops layers and experts, so kernels meet the real shapes.
// Thread: pure functions.
#pragma once

#include <string>

namespace millrace {

// kFlash and kPro are DeepSeek-V4-Flash and -Pro; kTiny has every kind of layer in a few megabytes.
enum class ModelPreset { kFlash, kPro, kTiny };

struct PresetChanges {
  int layers = 0;      // keep the first n layers; 0 keeps all
  int experts = 0;     // keep n routed experts; 0 keeps all
  bool plain = false;  // no quantization_config: BF16 weights
};

// CHECK-fails on more layers or experts than the preset has.
std::string PresetConfigJson(ModelPreset preset, PresetChanges changes = {});

}  // namespace millrace
