# SPDX-License-Identifier: MIT
"""MQA, GQA and MLA attention from PyTorch to ONNX and TensorRT, with one fused op and its proof."""

__version__ = "0.1.0"
