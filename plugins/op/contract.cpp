// SPDX-License-Identifier: MIT
#include "contract.h"

#include <cmath>

#include "refusal.h"

namespace fastmqa::op {

void check_attributes(const Attributes& a) {
  if (!std::isfinite(a.scale)) {
    refuse("scale=%g is not finite; usual is 1/sqrt(D)", static_cast<double>(a.scale));
  }
  if (a.is_causal != 0 && a.is_causal != 1) refuse("is_causal=%d is neither 0 nor 1", a.is_causal);
  if (a.window_left < -1 || a.window_right < -1) {
    refuse(
        "window_left=%d, window_right=%d: a window is a number of keys >= 0, or -1 for unbounded",
        a.window_left, a.window_right);
  }
  if (a.is_causal == 1 && a.window_right != -1) {
    refuse(
        "is_causal=1 with window_right=%d: is_causal already means window_right=0; give one of the "
        "two",
        a.window_right);
  }
  if (!std::isfinite(a.softcap) || a.softcap < 0) {
    refuse("softcap=%g is neither 0 (off) nor a positive finite number",
           static_cast<double>(a.softcap));
  }
  if (a.softmax_precision != 1 && a.softmax_precision != 10) {
    refuse("softmax_precision=%d is neither 1 (FLOAT) nor 10 (FLOAT16)", a.softmax_precision);
  }
  if (a.layout != 0 && a.layout != 1) {
    refuse("layout=%d is neither 0 (B, H, S, D) nor 1 (B, S, H, D)", a.layout);
  }
  if (const int32_t unknown = a.features & ~kAllFeatures) {
    refuse(
        "features=%d has unknown bits %#x; version %d knows 1 (MASK), 2 (LENGTHS), 4 (Q_START), "
        "8 (VALUES_IN_K), 16 (LSE): a newer exporter wrote this, so update the library",
        a.features, static_cast<unsigned>(unknown), kVersion);
  }
  if (a.has(kFeatureValuesInK) != (a.v_head_size > 0)) {
    refuse(
        "v_head_size=%d with features=%d: it is the head size of the values exactly where they lie "
        "in k (feature 8), and 0 otherwise",
        a.v_head_size, a.features);
  }
}

}  // namespace fastmqa::op
