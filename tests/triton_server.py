# SPDX-License-Identifier: MIT
"""A stand-in for Triton: serves a model repository over gRPC, each model by its config.pbtxt.

What it does of Triton is what an exported file needs: `reshape`, implicit state (zeros at first,
kept for each sequence), sequence flags, and the refusal of requests that do not fit the config.
onnxruntime runs the models, an engine's by the ONNX file of its CPU variant.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc
from tritonclient.utils import triton_to_np_dtype

from fastmqa_export.runtime import create_session


def read_config(folder: Path) -> Any:
    """The configuration of a model, by Triton's own schema."""
    text = (folder / "config.pbtxt").read_text(encoding="utf-8")
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def type_name(data_type: int) -> str:
    """The name of a number of the schema: 10 is FP16."""
    return model_config_pb2.DataType.Name(data_type).removeprefix("TYPE_")


class ServedModel:
    """One model and the caches of its sequences; ``forgetful`` loses them between requests."""

    def __init__(self, repository: Path, name: str, forgetful: bool = False) -> None:
        self.config = read_config(repository / name)
        file = next(repository.glob("*/1/model.onnx"))
        self.session = create_session(file, threads=1)
        self.sequences: dict[int, dict[str, Any]] = {}
        self.forgetful = forgetful

    def infer(self, request: Any) -> Any:
        feed = self.read_inputs(request)
        parameters = {key: value for key, value in request.parameters.items()}
        sequence, states = 0, {}
        if self.config.HasField("sequence_batching"):
            sequence = parameters["sequence_id"].int64_param
            if parameters["sequence_start"].bool_param:
                self.sequences[sequence] = self.initial_states()
            assert sequence in self.sequences, "must specify the START flag"
            states = self.sequences[sequence]
        declared = {state.input_name: state for state in self.config.sequence_batching.state}
        assert feed.keys() | declared.keys() == {x.name for x in self.session.get_inputs()}
        names = [output.name for output in self.config.output]
        state_names = [state.output_name for state in declared.values()]
        results = self.session.run([*names, *state_names], feed | states)
        if not self.forgetful:
            states.update(zip(declared, results[len(names) :], strict=True))
        if "sequence_end" in parameters and parameters["sequence_end"].bool_param:
            del self.sequences[sequence]

        response = service_pb2.ModelInferResponse(model_name=request.model_name)
        for output, array in zip(self.config.output, results, strict=False):
            check_dims(output.name, array.shape, output.dims)
            datatype = type_name(output.data_type)
            assert array.dtype == triton_to_np_dtype(datatype)
            response.outputs.add(name=output.name, datatype=datatype, shape=array.shape)
            response.raw_output_contents.append(array.tobytes())
        return response

    def read_inputs(self, request: Any) -> dict[str, Any]:
        declared = {x.name: x for x in self.config.input}
        assert {x.name for x in request.inputs} == declared.keys()
        feed = {}
        for given, raw in zip(request.inputs, request.raw_input_contents, strict=True):
            config = declared[given.name]
            assert given.datatype == type_name(config.data_type)
            check_dims(given.name, given.shape, config.dims)
            most = 1 if self.config.HasField("sequence_batching") else self.config.max_batch_size
            assert given.shape[0] <= most, f"batch of {given.shape[0]}"
            dtype = triton_to_np_dtype(given.datatype)
            array = np.frombuffer(raw, dtype).reshape(given.shape)
            if config.HasField("reshape"):
                array = array.reshape(given.shape[0], *config.reshape.shape)
            feed[given.name] = array
        return feed

    def initial_states(self) -> dict[str, Any]:
        states = {}
        for state in self.config.sequence_batching.state:
            (initial,) = state.initial_state
            assert initial.name and initial.zero_data
            assert (initial.data_type, initial.dims) == (state.data_type, state.dims)
            dtype = triton_to_np_dtype(type_name(state.data_type))
            states[state.input_name] = np.zeros([1, *initial.dims], dtype)
        return states


def check_dims(name: str, shape: Any, dims: Any) -> None:
    assert len(shape) == 1 + len(dims), f"{name}: {shape}"
    assert all(d in (-1, size) for d, size in zip(dims, shape[1:], strict=True)), f"{name}: {shape}"


class Service(service_pb2_grpc.GRPCInferenceServiceServicer):
    """The part of Triton's service that the smoke test calls."""

    def __init__(self, models: dict[str, ServedModel]) -> None:
        self.models = models

    def ModelReady(self, request, context):
        return service_pb2.ModelReadyResponse(ready=request.name in self.models)

    def ModelConfig(self, request, context):
        return service_pb2.ModelConfigResponse(config=self.models[request.name].config)

    def ModelMetadata(self, request, context):
        config = self.models[request.name].config
        reply = service_pb2.ModelMetadataResponse(name=request.name)
        for ours, theirs in ((config.input, reply.inputs), (config.output, reply.outputs)):
            for x in ours:
                theirs.add(name=x.name, datatype=type_name(x.data_type), shape=[-1, *x.dims])
        return reply

    def ModelInfer(self, request, context):
        try:
            return self.models[request.model_name].infer(request)
        except AssertionError as error:
            return context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))


@contextlib.contextmanager
def serve(repository: Path, *names: str, forgetful: bool = False) -> Iterator[str]:
    """Serve models of a repository; gives the address."""
    models = {name: ServedModel(repository, name, forgetful) for name in names}
    server = grpc.server(futures.ThreadPoolExecutor(2))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Service(models), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()
