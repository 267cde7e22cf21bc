// SPDX-License-Identifier: MIT
//
// The table of variants and a plan's launches in words and as JSON.
#pragma once

#include <string>

#include "check.h"
#include "plan.h"
#include "registry.h"

namespace fastmqa {

// Says that no variant covers the arguments, and which rows are near.
Status no_variant(const AttentionParams& params, const Device& device, const Registry& registry);

// {"error": ...} or {"variant": ..., "workspace_bytes": ..., "launches": [...]}.
std::string describe(const Status& status, const Plan& plan, const Registry& registry);

std::string describe_variants(const Registry& registry);

}  // namespace fastmqa
