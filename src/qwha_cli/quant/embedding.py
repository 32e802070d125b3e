"""The vocabulary in codes: an input embedding that reads the rows it is asked for, and the output head beside it.

For a small model the vocabulary is the largest thing that linear layers in few bits leave: 0.73 GiB of a 3B model's 1.9. Each
word is a row, quantized by rounding in the weight basis. An embedding makes numbers of the rows of its tokens only; a head is a
QuantizedLinear. Where a model shares one matrix between the two, the embedding has the codes and the head reads them there: two
modules with the same buffers would have two copies after `model.to(device)`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qwha_cli.errors import ArtifactError, ModelError
from qwha_cli.kernels.dequantize import gather_rows
from qwha_cli.quant.linear import QuantizedLinear
from qwha_cli.quant.module import PackedModule
from qwha_cli.quant.packed import PackedWeight, QuantFormat
from qwha_cli.quant.swap import replace

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class QuantizedEmbedding(PackedModule):
    """Stands where an nn.Embedding stood. Its codes are uninitialised until loaded, or put there by `take`.

    Args:
        original: The embedding, for its sizes, its dtype and its factor; its weight is not kept.
        format: How the codes are stored: the layout of GPTQ, in the weight basis.
        device: Of the buffers.

    Raises:
        ModelError: A row is no whole number of groups, or the embedding does more than look up rows and scale them.
    """

    like: Tensor

    def __init__(self, original: nn.Embedding, *, format: QuantFormat, device: torch.device | str | None = None) -> None:
        super().__init__((original.num_embeddings, original.embedding_dim), format=format, device=device)
        self.num_embeddings, self.embedding_dim = self.shape
        self.padding_idx = original.padding_idx
        factor = self._factor = _factor_of(original)
        # rounded as the embedding that it was did, and known before a pass could be recorded
        self._rounded = (
            {} if factor is None else {dtype: float(torch.tensor(factor, device="cpu").to(dtype)) for dtype in _FLOATS}
        )
        # in a tuple: as a submodule it would be part of the model
        self._original = (_without_weight(original),)
        # the model's dtype, which follows `model.to(dtype)` as a weight would; the codes do not
        self.register_buffer("like", torch.empty(0, dtype=original.weight.dtype, device="cpu"), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """The rows of words, in the model's dtype.

        Args:
            ids: (...) int64, on the module's device.

        Returns:
            (..., embedding_dim).
        """
        dtype = self.like.dtype
        rows = gather_rows(self.codes(), ids.reshape(-1), dtype)
        if self._rounded:
            rows = rows * self._rounded[dtype]
        return rows.view(*ids.shape, self.embedding_dim)

    def dequantized(self, dtype: torch.dtype) -> nn.Embedding:
        """A frozen embedding of the original kind that computes the same."""
        dense = copy.deepcopy(self._original[0])
        dense.weight = nn.Parameter(self.dense(dtype).detach(), requires_grad=False)
        if "embed_scale" in dense._buffers:
            dense.embed_scale = torch.tensor(self._factor, device=dense.weight.device)
        return dense.train(self.training)

    def extra_repr(self) -> str:
        """Sizes and format, for print(model)."""
        return f"num_embeddings={self.num_embeddings}, embedding_dim={self.embedding_dim}, {self._describe()}"


class TiedHead(QuantizedLinear):
    """A head whose matrix is the embedding's. It has no codes of its own, in memory or in files.

    Args:
        embedding: Has the codes.
        bias: (out,) or None; its own.
    """

    def __init__(self, embedding: QuantizedEmbedding, bias: Tensor | None) -> None:
        out_features, in_features = embedding.shape
        super().__init__(in_features, out_features, bias=False, format=embedding.format, owned=False)
        # in a tuple: as a submodule its tensors would be in the state dict twice
        self._embedding = (embedding,)
        self.bias = None if bias is None else bias.detach()

    @property
    def source(self) -> PackedModule:
        """The embedding."""
        return self._embedding[0]


@dataclass(frozen=True)
class Vocabulary:
    """Which modules of a model are its vocabulary, and how they are stored in codes.

    Attributes:
        embedding: Full name of the input embedding.
        head: Full name of the output head; None for a model without one.
        tied: Whether both are one matrix, which then lies under the embedding's name.
        format: Of both.
    """

    embedding: str
    head: str | None
    tied: bool
    format: QuantFormat

    @property
    def owners(self) -> tuple[str, ...]:
        """The modules that have codes of their own."""
        return (self.embedding,) if self.head is None or self.tied else (self.embedding, self.head)

    def to_dict(self) -> dict[str, object]:
        """JSON-able fields."""
        return {"embedding": self.embedding, "head": self.head, "tied": self.tied, "format": self.format.to_dict()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, object]) -> Vocabulary:
        """Undo `to_dict`.

        Raises:
            ArtifactError: A field is missing or has a value that this version cannot read.
        """
        embedding, head, tied, form = (fields.get(name) for name in ("embedding", "head", "tied", "format"))
        if not isinstance(embedding, str) or not isinstance(head, str | None) or not isinstance(form, Mapping):
            raise ArtifactError(
                f"unknown description of a quantized vocabulary: {dict(fields)}",
                where="config.json quantization_config",
                remedy="quantize the model again with `qwha quantize`, or read it with the version of qwha that wrote it",
            )
        return cls(embedding, head, bool(tied), QuantFormat.from_dict(cast("Mapping[str, object]", form)))


def vocabulary_of(model: PreTrainedModel, *, format: QuantFormat) -> Vocabulary:
    """The names of a model's embedding and head.

    Args:
        model: Not quantized there, in memory or a skeleton.
        format: What they will be stored as.

    Raises:
        ModelError: They are not an nn.Embedding and an nn.Linear of the kinds that can be stored so.
    """
    embedding, head = model.get_input_embeddings(), cast("nn.Module | None", model.get_output_embeddings())
    names = {id(module): name for name, module in model.named_modules()}
    if not isinstance(embedding, nn.Embedding):
        raise _unfit(names[id(embedding)], f"a {type(embedding).__name__} is no plain embedding")
    _factor_of(embedding)
    if head is None:
        return Vocabulary(names[id(embedding)], None, tied=False, format=format)
    if not isinstance(head, nn.Linear):
        raise _unfit(names[id(head)], f"a {type(head).__name__} is no plain linear layer")
    tied = bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))
    return Vocabulary(names[id(embedding)], names[id(head)], tied=tied, format=format)


def put_vocabulary(model: PreTrainedModel, vocabulary: Vocabulary, packed: Mapping[str, PackedWeight] | None = None) -> None:
    """Replace a model's embedding and head by quantized ones.

    Args:
        model: A skeleton or a whole model; changed in place.
        vocabulary: Which modules, and their format.
        packed: The codes of `vocabulary.owners`; None leaves them on the meta device, to be loaded.

    Raises:
        ArtifactError: A module of these names is missing or no embedding or linear layer.
        ModelError: A row is no whole number of groups.
    """
    modules = dict(model.named_modules())
    old = modules.get(vocabulary.embedding)
    if not isinstance(old, nn.Embedding):
        raise _foreign(vocabulary.embedding, model)
    embedding = QuantizedEmbedding(old, format=vocabulary.format, device="meta")
    replace(model, vocabulary.embedding, embedding)
    if packed is not None:
        embedding.take(packed[vocabulary.embedding])
    if vocabulary.head is None:
        return
    linear = modules.get(vocabulary.head)
    if not isinstance(linear, nn.Linear):
        raise _foreign(vocabulary.head, model)
    bias = cast("nn.Parameter | None", linear.bias)
    if vocabulary.tied:
        replace(model, vocabulary.head, TiedHead(embedding, bias))
        _forget_tie(model, vocabulary.head)
        return
    head = QuantizedLinear(
        linear.in_features,
        linear.out_features,
        bias=bias is not None,
        format=vocabulary.format,
        device="meta",
        dtype=linear.weight.dtype,
    )
    if packed is not None:
        head.take(packed[vocabulary.head])
        head.bias = None if bias is None else bias.detach()
    replace(model, vocabulary.head, head)


def dequantize_vocabulary(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace quantized embeddings, and heads tied to one, by plain ones that compute the same; other layers stay.

    Args:
        model: A model of transformers; changed in place.
        dtype: Of the new weights.
    """
    made: dict[int, nn.Embedding] = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantizedEmbedding):
            made[id(module)] = module.dequantized(dtype)
            replace(model, name, made[id(module)])
    for name, module in list(model.named_modules()):
        if isinstance(module, TiedHead):
            weight = made[id(module.source)].weight
            head = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
            head.weight = weight
            if module.bias is not None:
                head.bias = nn.Parameter(module.bias.to(dtype), requires_grad=False)
            replace(model, name, head)
            _remember_tie(model)


def vocabulary_in(model: PreTrainedModel) -> Vocabulary | None:
    """What `put_vocabulary` has put into a model, or transformers has loaded; None if its embedding is an ordinary one."""
    embedding, head = model.get_input_embeddings(), cast("nn.Module | None", model.get_output_embeddings())
    if not isinstance(embedding, QuantizedEmbedding):
        return None
    names = {id(module): name for name, module in model.named_modules()}
    return Vocabulary(
        names[id(embedding)],
        None if head is None else names[id(head)],
        tied=isinstance(head, TiedHead),
        format=embedding.format,
    )


def _forget_tie(model: PreTrainedModel, head: str) -> None:
    """Keep transformers from tying parameters that are no longer there."""
    own = cast("Mapping[str, str]", model._tied_weights_keys or {})  # pyright: ignore[reportPrivateUsage]
    every = cast("Mapping[str, str]", model.all_tied_weights_keys)
    # on the model, not on its class
    model._tied_weights_keys = _without(own, head)  # pyright: ignore[reportPrivateUsage]
    model.all_tied_weights_keys = _without(every, head)


def _without(keys: Mapping[str, str], head: str) -> dict[str, str]:
    return {name: other for name, other in keys.items() if not name.startswith(f"{head}.")}


def _remember_tie(model: nn.Module) -> None:
    model.__dict__.pop("_tied_weights_keys", None)
    if isinstance(model, PreTrainedModel):
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def _factor_of(embedding: nn.Embedding) -> float | None:
    """What an embedding multiplies its rows by; None for nothing."""
    if type(embedding) is nn.Embedding:
        return None
    factor = getattr(embedding, "scalar_embed_scale", getattr(embedding, "embed_scale", None))
    if type(embedding).__name__.endswith("ScaledWordEmbedding") and isinstance(factor, int | float):
        return float(factor)
    raise _unfit(type(embedding).__name__, "it does more than look up rows and scale them")


def _without_weight(embedding: nn.Embedding) -> nn.Embedding:
    nothing = nn.Parameter(torch.empty_like(embedding.weight, device="meta"), requires_grad=False)
    return copy.deepcopy(embedding, {id(embedding.weight): nothing})


def _unfit(where: str, why: str) -> ModelError:
    remedy = "keep the vocabulary in 16 bits with quantize.embedding_bits=16"
    return ModelError(f"the vocabulary cannot be quantized: {why}", where=f"layer {where}", remedy=remedy)


def _foreign(name: str, model: nn.Module) -> ArtifactError:
    return ArtifactError(
        f"{name} is not the embedding or head of a {type(model).__name__}",
        where="config.json quantization_config.vocabulary",
        remedy="load it with AutoModelForCausalLM, the class that it was saved from",
    )
