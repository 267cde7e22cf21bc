# SPDX-License-Identifier: MIT
"""Hugging Face models: load them without surprises, and make each attention one fused op.

transformers lets an attention be chosen by name (`AttentionInterface`), with a mask function of
its own (`AttentionMaskInterface`). Ours keep causality and windows as attributes of the op and
hand on only the padding, so that no S × T mask is ever built.

A model may still do something that the op does not know (sinks, chunked masks, position biases).
`check_attention` runs it both ways in PyTorch before anything is exported, so that such a model is
refused with the layer's name instead of exported wrong.
"""

from __future__ import annotations

import contextlib
import contextvars
import copy
import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

import fastmqa_export.op
from fastmqa_export import absorbed, falcon
from fastmqa_export.cache import CacheLayer, TracedCache
from fastmqa_export.config import OP_DOMAIN, OP_NAME
from fastmqa_export.errors import ExportError, SourceError
from fastmqa_export.onnx_export import Exportable, TensorSpec
from fastmqa_export.runtime import StepModel
from fastmqa_export.source import AttentionShape, Source, to_numpy

#: Name under which transformers knows our attention.
IMPLEMENTATION: Final = "fastmqa"

#: How messages call the op.
OP: Final = f"{OP_DOMAIN}::{OP_NAME}"

#: Arguments of an attention that change its meaning and that the op has no input for.
_UNKNOWN_ARGUMENTS: Final = {
    "s_aux": "attention sinks",
    "position_bias": "a position bias",
    "alibi": "ALiBi",
    "head_mask": "a head mask",
}


@dataclasses.dataclass
class _Run:
    """What the attentions of one forward pass need to know, and what they tell."""

    kv_lengths: Tensor | None = None
    inspect_masks: bool = False
    names: Mapping[torch.nn.Module, str] = dataclasses.field(default_factory=dict)
    called: set[torch.nn.Module] = dataclasses.field(default_factory=set)
    layer_windows: set[int] = dataclasses.field(default_factory=set)
    mask_windows: set[int] = dataclasses.field(default_factory=set)

    def layer(self, module: torch.nn.Module) -> str:
        """How messages call an attention."""
        return f"layer {self.names.get(module, '?')} ({type(module).__name__})"


_RUN: contextvars.ContextVar[_Run] = contextvars.ContextVar("_RUN")


@contextlib.contextmanager
def _running(run: _Run) -> Iterator[_Run]:
    token = _RUN.set(run)
    try:
        yield run
    finally:
        _RUN.reset(token)


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """One fused op: query (B, H, S, D), key and value (B, Hkv, T, ·) to (B, S, H, V)."""
    run = _RUN.get(_Run())
    for name, meaning in _UNKNOWN_ARGUMENTS.items():
        if arguments.get(name) is not None:
            raise ExportError(f"{run.layer(module)} uses {meaning} ({name}), which {OP} lacks")
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if sliding_window and not causal:
        raise ExportError(f"{run.layer(module)} has a sliding window without causality")
    window = sliding_window - 1 if sliding_window else -1
    on_latents = absorbed.is_adapted(module)
    output = fastmqa_export.op.fused_attention(
        absorbed.absorbed_query(module, query) if on_latents else query,
        key,
        None if on_latents else value,
        attention_mask,
        run.kv_lengths,
        scale=scaling,
        is_causal=causal,
        window_left=window,
        softcap=float(softcap or 0.0),
        v_head_size=int(module.kv_lora_rank) if on_latents else 0,  # type: ignore[arg-type]
    )
    assert isinstance(output, Tensor)
    if on_latents:
        output = absorbed.expanded_output(module, output)
    run.called.add(module)
    run.layer_windows.add(window)
    return output.transpose(1, 2), None


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    **arguments: Any,
) -> Tensor | None:
    """Only the padding, bool (B, 1, 1, T): causality and windows are attributes of the op."""
    run = _RUN.get(_Run())
    if run.inspect_masks and mask_function is not None:
        run.mask_windows.add(_window_of(mask_function))
    if attention_mask is None:
        return None
    return attention_mask[:, None, None, :kv_length].to(torch.bool)


def _window_of(mask_function: Callable[..., Any]) -> int:
    """How many keys before its own a query sees by such a mask, −1 for all.

    transformers gives masks as functions of indices, so they can be asked at any distance; a few
    tokens would not show that attention is chunked, say, every 8192 keys.

    Raises:
        ExportError: if it is none of these.
    """
    zero = torch.zeros((), dtype=torch.int64)
    kinds: set[int | str] = set()
    for query in (37, 4099, 65543):
        seen = torch.as_tensor(mask_function(zero, zero, zero + query, torch.arange(query + 9)))
        visible = seen.expand(query + 9).nonzero().flatten()
        low, high = visible.aminmax() if len(visible) else (zero, zero)
        if len(visible) != high - low + 1:
            kinds.update(("gaps", "in it"))
        elif len(visible) == query + 9:
            kinds.add("full")
        elif high != query:
            kinds.update(("ends", "elsewhere"))
        elif low > 0:
            kinds.add(int(query - low))
        elif query > 37:  # at the first queries a window is as wide as causality
            kinds.add("causal")
    if len(kinds) > 1:
        raise ExportError(
            "the model masks keys by position in a way that is neither causal nor a sliding window "
            f"(chunked or prefix attention, for example), which {OP} has no attribute for"
        )
    return next((kind for kind in kinds if isinstance(kind, int)), -1)


AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, _mask)


# Loading


def load_folder(folder: Path, dtype: torch.dtype, *, allow_pickle: bool = False) -> PreTrainedModel:
    """A model from a folder with ``config.json`` and safetensors.

    Args:
        folder: as ``save_pretrained`` writes it.
        dtype: of the weights; transformers keeps rotary frequencies in float32 all the same.
        allow_pickle: also read ``pytorch_model.bin``, which can run code of its author.

    Raises:
        SourceError: if it is no such folder, or the checkpoint is damaged or incomplete.
    """
    config_path = folder / "config.json"
    if not config_path.is_file():
        raise SourceError(
            f"{folder} has no config.json; a Hugging Face model is a folder with config.json and "
            "*.safetensors, as save_pretrained writes it"
        )
    try:
        json.loads(config_path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise SourceError(f"{config_path} cannot be read as JSON: {error}") from error
    has_safe = any(folder.glob("*.safetensors"))
    if not has_safe and not allow_pickle:
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt"))
        raise SourceError(
            f"{folder} has no *.safetensors"
            + (
                "; it has pickled weights, which can run code when they are loaded: convert them, "
                "or say --allow-pickle if you trust their author"
                if pickled
                else ": the weights are missing"
            )
        )
    return _load(folder, dtype, use_safetensors=has_safe, weights_only=True)


def load_gguf(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    """A model from a GGUF file, its weights turned into ``dtype``.

    Raises:
        SourceError: if it is not a complete GGUF file of an architecture transformers knows.
    """
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise SourceError(f"{path} is no GGUF file (it does not begin with 'GGUF')")
    return _load(path.parent, dtype, gguf_file=path.name)


def load_tokenizer(path: Path) -> Any | None:
    """The tokenizer beside a model folder or inside a GGUF file; None if there is none."""
    try:
        with _offline():
            if path.is_file():
                return transformers.AutoTokenizer.from_pretrained(
                    path.parent, gguf_file=path.name, trust_remote_code=False
                )
            return transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, ImportError, KeyError, TypeError):
        return None


def _load(folder: Path, dtype: torch.dtype, **options: Any) -> PreTrainedModel:
    # Said out loud, or transformers would ask on stdin whether to run code beside the weights.
    options["trust_remote_code"] = False
    with _offline():
        try:
            config = transformers.AutoConfig.from_pretrained(
                folder,
                **{k: v for k, v in options.items() if k in ("gguf_file", "trust_remote_code")},
            )
            kind = (
                transformers.AutoModelForCausalLM
                if type(config) in transformers.AutoModelForCausalLM._model_mapping
                else transformers.AutoModel
            )
            model, report = kind.from_pretrained(
                folder,
                dtype=dtype,
                attn_implementation="eager",
                output_loading_info=True,
                **options,
            )
        except Exception as error:
            reason = next((x for x in str(error).splitlines() if x.strip()), type(error).__name__)
            raise SourceError(
                f"{options.get('gguf_file', folder)} cannot be loaded: {type(error).__name__}: "
                f"{reason.strip()}. The checkpoint must be complete, undamaged and of an "
                "architecture that transformers knows"
            ) from error
    missing = sorted(report.get("missing_keys", ()))
    wrong = sorted(str(key) for key in report.get("mismatched_keys", ()))
    if missing or wrong:
        what = f"{len(missing)} tensors are missing" if missing else f"{len(wrong)} do not fit"
        raise SourceError(
            f"{options.get('gguf_file', folder)} is half a checkpoint: {what}, for example "
            f"{(missing or wrong)[0]}. Fetch all of its files again"
        )
    model.eval().requires_grad_(False)
    return model


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """No look at a hub, no progress bars of others, no warnings about what we chose."""
    verbosity = transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    before = {name: os.environ.get(name) for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")}
    os.environ.update(dict.fromkeys(before, "1"))
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


# What the op can express


def attention_modules(model: PreTrainedModel) -> dict[torch.nn.Module, str]:
    """The attentions of a model with their names, in order."""
    return {
        module: name
        for name, module in model.named_modules()
        if hasattr(module, "layer_idx") and "attention" in type(module).__name__.lower()
    }


def check_attention(model: PreTrainedModel) -> tuple[CacheLayer, ...]:
    """Run a few tokens with our attention and with the model's own, and compare layer by layer.

    Args:
        model: in any dtype; unchanged afterwards.

    Returns:
        What each layer caches.

    Raises:
        ExportError: naming the layer, if an attention does not go through the interface or gives
            other numbers.
    """
    config = model.config
    if getattr(config, "is_encoder_decoder", False):
        raise ExportError(
            f"{type(model).__name__} is an encoder-decoder; export handles decoders and encoders"
        )
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, config.get_text_config().vocab_size, (2, 5), generator=generator)
    names = attention_modules(model)
    if not names:
        raise ExportError(
            f"{type(model).__name__} has no attention layers (modules with a layer index) that "
            "could become nodes"
        )

    _check_rotation(model)
    own: dict[torch.nn.Module, Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda m, _, out: own.__setitem__(m, _first(out)))
        for module in names
    ]
    ours: dict[torch.nn.Module, Tensor] = {}
    try:
        with torch.no_grad(), implementation(model, "eager"):
            model(input_ids=tokens)
        reference = dict(own)
        own.clear()
        run = _Run(inspect_masks=True, names=names)
        with torch.no_grad(), implementation(model, IMPLEMENTATION), _running(run):
            result = model(input_ids=tokens)
        ours = dict(own)
    except ExportError:
        raise
    except Exception as error:
        raise ExportError(
            f"{type(model).__name__} cannot be run on tokens alone ({type(error).__name__}: "
            f"{error}); export handles text models"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()

    for module in names:
        if module not in run.called:
            raise ExportError(
                f"{run.layer(module)} computes attention itself instead of through transformers' "
                f"attention interface, so it cannot become {OP}"
            )
        difference = (ours[module] - reference[module]).abs().max().item()
        scale = reference[module].abs().max().item()
        if not difference <= 64 * torch.finfo(model.dtype).eps * max(scale, 1e-3):
            raise ExportError(
                f"{run.layer(module)} gives other numbers with {OP} than with its own attention "
                f"(largest difference {difference:.2e} of {scale:.2e}): it does something that "
                "the op does not express"
            )
    if run.mask_windows and run.mask_windows != run.layer_windows:
        raise ExportError(
            f"the layers of {type(model).__name__} have windows {sorted(run.layer_windows)} and "
            f"its masks {sorted(run.mask_windows)} (-1: none), so one would be lost in {OP}"
        )
    cache = getattr(result, "past_key_values", None)
    if cache is None:
        return ()
    for index, layer in enumerate(cache.layers):
        if getattr(layer, "keys", None) is None:
            raise ExportError(
                f"layer {index} of {type(model).__name__} caches something else than keys and "
                f"values ({type(layer).__name__}); export handles models of attention alone"
            )
    # A latent and its rotary key share one buffer, so that the op finds its keys ready.
    on_latents = any(absorbed.can_absorb(module) for module in names)
    return tuple(
        CacheLayer(1, layer.keys.shape[3] + layer.values.shape[3], 0)
        if on_latents
        else CacheLayer(layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3])
        for layer in cache.layers
    )


def _check_rotation(model: PreTrainedModel) -> None:
    """Check that rotary frequencies do not depend on how long the longest sequence is.

    Such a model's numbers change for all tokens, cached ones too, once a length is passed; a
    graph, and a comparison of short sequences, would know only one side of it.

    Raises:
        ExportError: naming the module.
    """
    for name, module in model.named_modules():
        kinds = getattr(module, "rope_type", None)
        for kind in kinds.values() if isinstance(kinds, dict) else [kinds]:
            if isinstance(kind, str) and (kind == "longrope" or "dynamic" in kind):
                raise ExportError(
                    f"{name} ({type(module).__name__}) has rotary frequencies of type {kind}, "
                    "which change with the length of the longest sequence; a graph cannot"
                )


def _first(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@contextlib.contextmanager
def implementation(model: PreTrainedModel, name: str, *, absorb: bool = True) -> Iterator[None]:
    """Run the model with another attention for a while.

    Args:
        model: any.
        name: `IMPLEMENTATION` or one of transformers' own.
        absorb: with ours, run latent attention on the latents themselves.
    """
    before = model.config._attn_implementation
    # set_attn_implementation() refuses models like Falcon, whose forward reads the config anyway.
    model.config._attn_implementation = name
    try:
        with contextlib.ExitStack() as adaptations:
            if name == IMPLEMENTATION:
                adaptations.enter_context(falcon.adapted(model, _attention))
                if absorb:
                    adaptations.enter_context(absorbed.adapted(model))
            yield
    finally:
        model.config._attn_implementation = before


# Modules to trace


class _CacheLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer of transformers' cache, standing on a `TracedCache`."""

    is_compileable = False
    is_sliding = False

    def __init__(self, cache: TracedCache, index: int) -> None:
        super().__init__()
        self.cache, self.index = cache, index
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
        if self.cache.values[self.index] is None:  # one buffer for a latent and its rotary key
            both = torch.cat([key_states, value_states], -1)
            return self.cache.update(self.index, both)
        return self.cache.update(self.index, key_states, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.keys[self.index].shape[2], 0

    def get_seq_length(self) -> int:
        return 0  # positions are given as position_ids

    def get_max_length(self) -> int:
        return self.cache.keys[self.index].shape[2]


class _WithCache(torch.nn.Module):
    """input_ids (B, S), position (B,), caches (B, Hkv, T, ·) to logits and the caches written."""

    def __init__(self, model: PreTrainedModel, layers: tuple[CacheLayer, ...]) -> None:
        super().__init__()
        self.model = model
        self.layers = layers

    def forward(
        self, input_ids: Tensor, position: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, ...]:
        buffers = iter(past)
        pairs = [
            (next(buffers), next(buffers) if layer.value_size else None) for layer in self.layers
        ]
        cache = TracedCache([k for k, _ in pairs], [v for _, v in pairs], position)
        sequence = input_ids.shape[1]
        layers = [_CacheLayer(cache, index) for index in range(len(pairs))]
        with _running(_Run(kv_lengths=cache.kv_lengths(sequence))):
            output = self.model(
                input_ids=input_ids,
                position_ids=position[:, None] + torch.arange(sequence),
                past_key_values=Cache(layers=layers),
                use_cache=True,
            )
        present = (x for pair in zip(cache.keys, cache.values, strict=True) for x in pair)
        return (output.logits, *(x for x in present if x is not None))


class _WithoutCache(torch.nn.Module):
    """input_ids and attention_mask (B, S) to logits, or to hidden states of an encoder."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        arguments: dict[str, Any] = {}
        if is_decoder(self.model):
            # As generate() does it: padding on either side leaves positions without gaps.
            arguments["position_ids"] = (attention_mask.cumsum(-1) - 1).clamp(min=0)
            arguments["use_cache"] = False
        with _running(_Run()):
            output = self.model(input_ids=input_ids, attention_mask=attention_mask, **arguments)
        return (output[0],)


def is_decoder(model: PreTrainedModel) -> bool:
    """Whether the model predicts the next token."""
    return bool(model.can_generate())


def exportable(
    model: PreTrainedModel, layers: tuple[CacheLayer, ...], *, cache: str, source: str
) -> Exportable:
    """The module to trace, with ``implementation(model, IMPLEMENTATION)`` in force.

    Args:
        model: in the dtype of the file.
        layers: from `check_attention`.
        cache: "static": buffers written in place; "none": a graph without a cache.
        source: name of the model for the metadata.
    """
    metadata = {"source": source, "cache": cache, "architecture": type(model).__name__}
    attentions = len(attention_modules(model))
    if cache == "none":
        tokens = ("batch", "sequence")
        return Exportable(
            _WithoutCache(model),
            (
                TensorSpec("input_ids", torch.int64, tokens),
                TensorSpec("attention_mask", torch.int64, tokens),
            ),
            ("logits" if is_decoder(model) else "last_hidden_state",),
            metadata,
            attentions=attentions,
        )
    if not layers:
        raise ExportError(f"{type(model).__name__} has no KV cache; export it with --cache none")
    inputs = [
        TensorSpec("input_ids", torch.int64, ("batch", "sequence")),
        TensorSpec("position", torch.int64, ("batch",)),
    ]
    outputs = ["logits"]
    for index, layer in enumerate(layers):
        for name, size in (("key", layer.key_size), ("value", layer.value_size)):
            if size == 0:
                continue
            shape = ("batch", layer.kv_heads, "capacity", size)
            inputs.append(TensorSpec(f"past_key_values.{index}.{name}", model.dtype, shape))
            outputs.append(f"present.{index}.{name}")
    return Exportable(
        _WithCache(model, layers),
        tuple(inputs),
        tuple(outputs),
        metadata,
        first_list=2,
        attentions=attentions,
    )


# The source


class HuggingFaceSource(Source):
    """A decoder or encoder of transformers, from a folder or a GGUF file."""

    input_name = "input_ids"

    def __init__(self, path: Path, dtype: torch.dtype, *, allow_pickle: bool = False) -> None:
        """Load and check the model; its weights are rounded to ``dtype`` once."""
        self.path: Path | None = path
        if path.is_dir():
            self.kind = "hugging-face"
            model = load_folder(path, dtype, allow_pickle=allow_pickle)
        else:
            self.kind = "gguf"
            model = load_gguf(path, dtype)
        self._take(model, path.name)

    @classmethod
    def from_model(cls, model: PreTrainedModel, name: str) -> HuggingFaceSource:
        """A source of a model that is loaded already, in its own dtype."""
        self = cls.__new__(cls)
        self.path = None
        self.kind = "factory"
        self._take(model.eval().requires_grad_(False), name)
        return self

    def _take(self, model: PreTrainedModel, name: str) -> None:
        self.name, self.model, self.dtype = name, model, model.dtype
        self.output_name = "logits" if is_decoder(model) else "last_hidden_state"
        self.layers = check_attention(model)
        self._wide: PreTrainedModel | None = None
        shape = self.shape()
        cached = (
            f"{shape.latent_columns} latent columns cached"
            if shape.latent_columns
            else f"{shape.num_kv_heads} KV heads"
        )
        self.description = (
            f"{type(model).__name__}, {shape.layers} layers, {shape.num_heads} query heads of "
            f"{shape.head_dim}, {cached}"
        )

    def shape(self) -> AttentionShape:
        """Sizes of the attention, from the caches where there are any."""
        config = self.model.config.get_text_config()
        heads = config.num_attention_heads
        first = self.layers[0] if self.layers else None
        shape = AttentionShape(
            layers=len(self.layers) or config.num_hidden_layers,
            num_heads=heads,
            num_kv_heads=first.kv_heads if first else heads,
            head_dim=first.key_size if first else config.hidden_size // heads,
        )
        is_latent = bool(getattr(config, "kv_lora_rank", None))  # DeepSeek: latent, rotary part
        if first and is_latent:
            return dataclasses.replace(
                shape,
                head_dim=config.qk_nope_head_dim + config.qk_rope_head_dim,
                latent_columns=first.key_size + first.value_size,
            )
        return shape

    def parameters(self) -> int:
        """Number of weights, shared ones counted once."""
        return sum(p.numel() for p in self.model.parameters())

    @contextlib.contextmanager
    def traceable(self, cache: str) -> Iterator[Exportable]:
        """The module to trace; while the context is open the model has our attention."""
        # One file prefills and decodes: on latents, decoding reads 1 / H of the bytes.
        with implementation(self.model, IMPLEMENTATION, absorb=cache == "static"):
            yield exportable(self.model, self.layers, cache=cache, source=self.name)

    def sample(self, batch: int, length: int, generator: torch.Generator) -> Tensor:
        """Random tokens (B, N)."""
        vocabulary = self.model.config.get_text_config().vocab_size
        return torch.randint(0, vocabulary, (batch, length), generator=generator)

    def evaluate(self, x: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """Transformers' own eager attention over one sequence, and what it caches of it."""
        context: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        model = self.model
        if dtype == torch.float64 != self.dtype:
            self._wide = self._wide or copy.deepcopy(self.model).double()
            model, context = self._wide, EverythingInFloat64()
        cache = DynamicCache() if self.layers else None  # without a config: windows keep all keys
        arguments = {} if cache is None else {"past_key_values": cache, "use_cache": True}
        with torch.no_grad(), context, implementation(model, "eager"):
            output = model(input_ids=x, **arguments)
        outputs = {self.output_name: output[0]}
        cached = zip(self.layers, cache.layers if cache else (), strict=True)
        for index, (ours, layer) in enumerate(cached):
            # Some models cache repeated keys and values; ours are cached once per KV head.
            repeats = layer.keys.shape[1] // ours.kv_heads
            key, value = layer.keys[:, ::repeats], layer.values[:, ::repeats]
            if ours.value_size:
                outputs[f"present.{index}.key"] = key
                outputs[f"present.{index}.value"] = value
            else:
                outputs[f"present.{index}.key"] = torch.cat([key, value], -1)
        return outputs

    def steps(self) -> StepModel:
        """The model with torch's scaled dot-product attention and transformers' own cache."""
        return _Steps(self.model)

    def tokenizer(self) -> Any | None:
        """The tokenizer beside the model, None if there is none."""
        if self.path is None or not is_decoder(self.model):
            return None
        return load_tokenizer(self.path)

    def stop_tokens(self) -> frozenset[int]:
        """Tokens that end a text."""
        ids = self.model.generation_config.eos_token_id
        return frozenset([] if ids is None else [ids] if isinstance(ids, int) else ids)

    def generate(self, prompt: list[int], new_tokens: int) -> list[int]:
        """Greedy continuation by transformers, with its own attention and cache."""
        x = torch.tensor([prompt])
        with torch.no_grad(), implementation(self.model, "eager"):
            tokens = self.model.generate(
                x,
                attention_mask=torch.ones_like(x),
                generation_config=GenerationConfig(
                    max_new_tokens=new_tokens,
                    do_sample=False,
                    eos_token_id=sorted(self.stop_tokens()) or None,
                    pad_token_id=0,
                ),
            )
        return [int(t) for t in tokens[0, len(prompt) :]]


class _Steps:
    """A `fastmqa_export.runtime.StepModel` of one sequence."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.attention = "sdpa" if model._supports_sdpa else "eager"

    def reset(self, batch: int, capacity: int = 1) -> None:
        self.cache = DynamicCache(config=self.model.config)
        self.model.config._attn_implementation = self.attention

    def step(self, x: NDArray[Any]) -> NDArray[Any]:
        with torch.no_grad():
            output = self.model(torch.from_numpy(x), past_key_values=self.cache, use_cache=True)
        return to_numpy(output.logits)

    def advance(self, counts: Sequence[int] | NDArray[Any]) -> None:
        """Nothing to do: transformers' cache counts what it was given."""


class EverythingInFloat64(TorchFunctionMode):
    """Turns a model's explicit float32 (norms, softmax, rotary angles) into float64.

    transformers' models cast to float32 where a half type would be too narrow. In an oracle that
    cast would be the largest error.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace ``torch.float32`` among the arguments, and ``.float()``."""
        if func is Tensor.float:
            func = Tensor.double
        args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return func(*args, **kwargs)
