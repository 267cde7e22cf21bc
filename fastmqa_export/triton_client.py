# SPDX-License-Identifier: MIT
"""Smoke test of models that `fastmqa-export bundle` made, through a running Triton server.

The server says what a model takes, and no expected numbers are needed: a sequence sent in two
steps, between those of another sequence, must give what it gives when sent at once (so Triton keeps
each sequence's cache); a padded one what it gives without padding; and the engine what the ONNX
file gives on the CPU.

`bundle` copies this file beside the models. It needs numpy and ``tritonclient[grpc]`` only.
"""

from __future__ import annotations

import argparse
import json
import secrets
import sys
import time
from pathlib import Path
from typing import Any, Final

import numpy as np
import tritonclient.grpc as triton
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException, triton_to_np_dtype

#: Largest difference of two right answers, as a share of the largest magnitude: TF32 products of
#: float32 models, sums in another order. A lost cache differs by about as much as the answer.
LIMITS: Final = {"FP32": 5e-3, "FP16": 2e-2, "BF16": 1e-1}
#: Length of the sequences that are sent.
TOKENS: Final = 8
#: Token ids are below this, as every vocabulary is larger.
_TOKEN_IDS: Final = 16

Array = NDArray[Any]


class Model:
    """A model of the server.

    Attributes:
        keeps_state: whether it has a KV cache, so that requests belong to sequences.
        limit: of a difference, see `LIMITS`.
    """

    def __init__(self, client: Any, name: str) -> None:
        self._client, self._name = client, name
        metadata = client.get_model_metadata(name)
        self._inputs = list(metadata.inputs)
        self._output = metadata.outputs[0].name
        self.keeps_state = client.get_model_config(name).config.HasField("sequence_batching")
        self.limit = LIMITS[metadata.outputs[0].datatype]

    def sample(self, seed: int) -> Array:
        """A random sequence (1, TOKENS, …) of what the first input takes."""
        generator = np.random.default_rng(seed)
        shape = [1, TOKENS, *self._inputs[0].shape[2:]]
        dtype = triton_to_np_dtype(self._inputs[0].datatype)
        if np.issubdtype(dtype, np.integer):
            return generator.integers(_TOKEN_IDS, size=shape).astype(dtype)
        return generator.standard_normal(shape).astype(dtype)

    def infer(self, x: Array, valid: int = TOKENS, position: int = 0, **sequence: Any) -> Array:
        """The output (1, S, …) for x (1, S, …).

        Args:
            x: a sequence, or what comes next of it.
            valid: how many leading tokens of x are real, of a model without a cache.
            position: how many tokens of the sequence were sent before.
            sequence: ``sequence_id``, ``sequence_start`` and ``sequence_end``.
        """
        others = {
            "position": np.array([[position]]),
            "lengths": np.array([[valid]]),
            "attention_mask": np.arange(x.shape[1])[None] < valid,
        }
        requested = []
        for tensor in self._inputs:
            array = x if tensor is self._inputs[0] else others[tensor.name]
            given = triton.InferInput(tensor.name, list(array.shape), tensor.datatype)
            given.set_data_from_numpy(array.astype(triton_to_np_dtype(tensor.datatype)))
            requested.append(given)
        y: Array = self._client.infer(self._name, requested, **sequence).as_numpy(self._output)
        return y.astype(np.float32)

    def whole(self, x: Array) -> Array:
        """The output for a whole sequence, sent in one request."""
        if not self.keeps_state:
            return self.infer(x)
        return self.infer(x, sequence_id=_new_id(), sequence_start=True, sequence_end=True)

    def own_difference(self) -> tuple[str, float]:
        """What else must give the same answer, and by how much it differs."""
        first, second = self.sample(1), self.sample(2)
        if not self.keeps_state:
            padded = self.infer(np.concatenate([first, second], axis=1))[:, :TOKENS]
            return "padded", difference(padded, self.whole(first))
        whole = [self.whole(x) for x in (first, second)]
        ids, last = [_new_id(), _new_id()], TOKENS - 1
        for x, name in zip((first, second), ids, strict=True):
            self.infer(x[:, :last], sequence_id=name, sequence_start=True)
        steps = [
            self.infer(x[:, last:], position=last, sequence_id=name, sequence_end=True)
            for x, name in zip((first, second), ids, strict=True)
        ]
        return "in two steps", max(
            difference(step, y[:, last:]) for step, y in zip(steps, whole, strict=True)
        )


def difference(y: Array, expected: Array) -> float:
    """The largest difference, as a share of the largest magnitude; infinite where one is NaN."""
    if y.shape != expected.shape or not (np.isfinite(y).all() and np.isfinite(expected).all()):
        return float("inf")
    return float(np.abs(y - expected).max() / np.abs(expected).max())


def _new_id() -> int:
    """A sequence that no other client has."""
    return secrets.randbits(63) | 1


def check(client: Any, names: list[str]) -> bool:
    """Check the models and print a line for each comparison; whether all are right."""
    models = {name: Model(client, name) for name in names}
    rows = [(name, *model.own_difference(), model.limit) for name, model in models.items()]
    reference = models[names[-1]]
    x = reference.sample(3)
    for name in names[:-1]:
        found = difference(models[name].whole(x), reference.whole(x))
        rows.append((name, f"against {names[-1]}", found, models[name].limit))
    for name, what, found, limit in rows:
        mark = "ok  " if found <= limit else "FAIL"
        print(f"{mark} {name} {what}: differs by {found:.1e}, limit {limit:.0e}")
    return all(found <= limit for _, _, found, limit in rows)


def main() -> int:
    """Exit code: 0 right, 1 wrong or no answer."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--url", default="localhost:8001", help="of Triton's gRPC service")
    parser.add_argument("--wait", type=float, default=60, help="seconds to wait for the models")
    arguments = parser.parse_args()
    bundle = json.loads(Path(__file__).with_name("bundle.json").read_text(encoding="utf-8"))
    names = list(bundle["models"])
    client = triton.InferenceServerClient(arguments.url)
    deadline = time.monotonic() + arguments.wait
    while True:
        try:
            if all(client.is_model_ready(name) for name in names):
                return 0 if check(client, names) else 1
            problem = "not all models are ready; the server's log says why"
        except InferenceServerException as error:
            problem = str(error)
            if error.status() != "StatusCode.UNAVAILABLE":
                break
        if time.monotonic() > deadline:
            break
        time.sleep(0.5)
    print(f"FAIL {arguments.url}: {problem}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
