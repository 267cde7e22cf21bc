// SPDX-License-Identifier: MIT
#include "shape_inference.h"

#include <array>
#include <memory>
#include <vector>

#include "../op/contract.h"

namespace fastmqa::ort {
namespace {

struct Dim {
  int64_t size;      // -1 if it is not a number
  const char* name;  // "" if it has none
};

struct Shape {
  ONNXTensorElementDataType type;
  std::vector<Dim> dims;
};

// Of an input, whose memory onnxruntime keeps; no dimensions if it is not of rank 4.
Shape shape_of(const OrtShapeInferContext* context, op::Tensor input) {
  OrtTensorTypeAndShapeInfo* info = nullptr;
  Ort::ThrowOnError(Ort::GetApi().ShapeInferContext_GetInputTypeShape(
      context, static_cast<size_t>(input), &info));
  const Ort::ConstTensorTypeAndShapeInfo given(info);
  Shape shape{given.GetElementType(), {}};
  if (given.GetDimensionsCount() != 4) return shape;
  std::array<int64_t, 4> sizes;
  std::array<const char*, 4> names;
  Ort::ThrowOnError(Ort::GetApi().GetDimensions(given, sizes.data(), sizes.size()));
  Ort::ThrowOnError(Ort::GetApi().GetSymbolicDimensions(given, names.data(), names.size()));
  for (size_t i = 0; i < sizes.size(); ++i) shape.dims.push_back({sizes[i], names[i]});
  return shape;
}

int64_t attribute(const OrtShapeInferContext* context, const char* name) {
  const OrtOpAttr* found = nullptr;
  int64_t value = 0;
  size_t bytes = 0;
  const OrtApi& api = Ort::GetApi();
  Ort::Status status(api.ShapeInferContext_GetAttribute(context, name, &found));
  if (status.IsOK()) {
    status = Ort::Status(api.ReadOpAttr(found, ORT_OP_ATTR_INT, &value, sizeof value, &bytes));
  }
  return status.IsOK() ? value : 0;
}

// Not even in part if a dimension is unknown: onnxruntime takes no such dimension from a custom op,
// and an invented name would make two sizes one.
void set_output(const OrtShapeInferContext* context, op::Tensor output, const Shape& shape) {
  std::vector<int64_t> sizes;
  std::vector<const char*> names;
  for (const Dim& dim : shape.dims) {
    if (dim.size < 0 && *dim.name == '\0') return;
    sizes.push_back(dim.size);
    names.push_back(dim.size < 0 ? dim.name : "");
  }
  const OrtApi& api = Ort::GetApi();
  OrtTensorTypeAndShapeInfo* made = nullptr;
  Ort::ThrowOnError(api.CreateTensorTypeAndShapeInfo(&made));
  const std::unique_ptr<OrtTensorTypeAndShapeInfo, decltype(api.ReleaseTensorTypeAndShapeInfo)>
      info(made, api.ReleaseTensorTypeAndShapeInfo);
  Ort::ThrowOnError(api.SetTensorElementType(info.get(), shape.type));
  Ort::ThrowOnError(api.SetDimensions(info.get(), sizes.data(), sizes.size()));
  Ort::ThrowOnError(api.SetSymbolicDimensions(info.get(), names.data(), names.size()));
  Ort::ThrowOnError(api.ShapeInferContext_SetOutputTypeShape(
      context, static_cast<size_t>(output - op::kInputs), info.get()));
}

void infer(const OrtShapeInferContext* context) {
  const auto [type, q] = shape_of(context, op::kQ);
  if (q.empty()) return;
  const int64_t features = attribute(context, "features");
  Dim columns{attribute(context, "v_head_size"), ""};
  if ((features & op::kFeatureValuesInK) == 0) {
    const Shape v = shape_of(context, op::kV);
    if (v.dims.empty()) return;
    columns = v.dims[3];
  }
  set_output(context, op::kY, {type, {q[0], q[1], q[2], columns}});
  if ((features & op::kFeatureLse) != 0) {
    const bool rows_first = attribute(context, "layout") == 1;
    set_output(context, op::kLse,
               {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT,
                {q[0], q[rows_first ? 2 : 1], q[rows_first ? 1 : 2]}});
  }
}

}  // namespace

OrtStatus* infer_output_shapes(const OrtCustomOp*, OrtShapeInferContext* context) noexcept {
  try {
    infer(context);
  } catch (const std::exception&) {  // nothing is inferred, then
  }
  return nullptr;
}

}  // namespace fastmqa::ort
