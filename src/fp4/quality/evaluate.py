"""Evaluation of a model: perplexity on a text, and how far its predictions are from those of the original."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from fp4.checkpoint.contradictions import refuse_endless
from fp4.checkpoint.io.hub import checked_token, open_headers
from fp4.host_memory import is_out_of_memory
from fp4.nn.activations import describe_activations, set_activations

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# This many logits at a time are turned into float32 log-probabilities.
_CHUNK_ELEMENTS = 1 << 23

Progress = Callable[[int, int], None]
ActivationChoice = Literal["auto", "fp4", "model"]


@dataclass(frozen=True)
class Comparison:
    """The result of :func:`compare`.

    Attributes:
        perplexity: of the model, as :func:`perplexity` defines it.
        original_perplexity: of the original.
        kl_mean: Kullback-Leibler divergence of the model's next-token distribution from the original's,
            KL(original || model), in nats: mean over all positions.
        kl_p99: 99th percentile of the same.
        top1_agreement: share of positions where both models find the same token most likely.
    """

    perplexity: float
    original_perplexity: float
    kl_mean: float
    kl_p99: float
    top1_agreement: float


@dataclass(frozen=True)
class Evaluation:
    """The result of :func:`evaluate`: what was measured, on what text, and how the model ran.

    Attributes:
        model: folder or hub id.
        data: name, SHA-256 and length in tokens of the text.
        window: tokens a window.
        windows: number of windows.
        dtype: dtype of the model.
        device: where it ran.
        perplexity: as :func:`perplexity` defines it.
        runs: number of layers by how they ran, such as ``"nvfp4, fp4 activations, cpu"``.
        against: folder or hub id of the original, None without one.
        comparison: None without an original.
    """

    model: str
    data: dict[str, Any]
    window: int
    windows: int
    dtype: str
    device: str
    perplexity: float
    runs: dict[str, int] = field(default_factory=dict)
    against: str | None = None
    comparison: Comparison | None = None

    def to_dict(self) -> dict[str, Any]:
        """The evaluation as a JSON object, which ``fp4 evaluate --save`` writes."""
        return asdict(self)


def split_windows(token_ids: Tensor, window: int, windows: int | None = None, first: int | None = None) -> Tensor:
    """Windows of tokens that do not overlap; tokens after the last whole window are left out.

    Args:
        token_ids: integer ``[tokens]`` or ``[1, tokens]``.
        window: tokens a window, at least 2.
        windows: how many windows from the start; all by default.
        first: a token that every window starts with and that is not in the text, such as a tokenizer's BOS.

    Returns:
        integer ``[windows, window]``.

    Raises:
        ValueError: a window of fewer than 2 tokens, or a text too short for the windows asked for.
    """
    ids = token_ids.reshape(-1)
    if window < 2:
        raise ValueError(f"window is {window}; perplexity needs windows of at least 2 tokens")
    size = window if first is None else window - 1
    count = ids.numel() // size if windows is None else windows
    if count < 1 or count * size > ids.numel():
        count = max(count, 1)
        raise ValueError(
            f"the text has {ids.numel()} tokens, expected at least {count * size} ({count} windows of {size}); "
            "use a longer text or smaller windows"
        )
    rows = ids[: count * size].reshape(count, size)
    return rows if first is None else torch.cat([rows.new_full((count, 1), first), rows], dim=1)


@torch.inference_mode()
def perplexity(
    model: Any,
    token_ids: Tensor,
    window: int = 1024,
    windows: int | None = None,
    *,
    first: int | None = None,
    progress: Progress | None = None,
) -> float:
    """Perplexity of a causal language model: exp of the mean over windows of their mean negative log likelihoods.

    Windows do not overlap and every one starts without context; tokens after the last whole window are left out. Token
    probabilities are taken in float32 whatever the model computes in.

    Args:
        model: a causal language model of Transformers (``model(input_ids=...).logits``), on any device.
        token_ids: integer ``[tokens]`` or ``[1, tokens]``.
        window: tokens a window, at least 2.
        windows: how many windows from the start of the text; all of them by default.
        first: a token that every window starts with (:func:`split_windows`).
        progress: called with the number of windows done and in all.

    Raises:
        ValueError: a window of fewer than 2 tokens, or a text too short for the windows asked for.
    """
    rows = split_windows(token_ids, window, windows, first)
    losses = []
    for done, row in enumerate(rows, 1):
        logits = _logits(model, row)
        targets = row[1:].to(logits.device)
        chunks = zip(*(t.split(_chunk(logits)) for t in (logits[:-1], targets)), strict=True)
        total = sum(torch.nn.functional.cross_entropy(c.float(), t, reduction="sum").item() for c, t in chunks)
        losses.append(total / (window - 1))
        if progress is not None:
            progress(done, len(rows))
    return math.exp(sum(losses) / len(losses))


@torch.inference_mode()
def compare(
    model: Any,
    original: Any,
    token_ids: Tensor,
    window: int = 1024,
    windows: int | None = None,
    *,
    first: int | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Compare the predictions of two causal language models, token by token.

    One window's logits of each model are in memory at a time, in the model's dtype.

    Args:
        model: a causal language model of Transformers.
        original: another one, which may be on another device.
        token_ids: integer ``[tokens]`` or ``[1, tokens]``.
        window: tokens a window, at least 2.
        windows: how many windows from the start of the text; all of them by default.
        first: a token that every window starts with (:func:`split_windows`).
        progress: called with the number of windows done and in all.

    Raises:
        ValueError: as for :func:`perplexity`, or the models' vocabularies differ in size.
    """
    rows = split_windows(token_ids, window, windows, first)
    losses, original_losses, agreements = [], [], 0
    divergences: list[Tensor] = []
    for done, row in enumerate(rows, 1):
        ours = _logits(model, row)
        theirs = _logits(original, row).to(ours.device)
        if ours.shape != theirs.shape:
            raise ValueError(
                f"the model predicts {ours.shape[-1]} tokens, the original {theirs.shape[-1]}; "
                "their predictions can be compared only over one vocabulary"
            )
        targets = torch.cat([row[1:], row[:1]]).to(ours.device)  # the last position's target is not used
        loss, original_loss = [], []
        for a, b, t in zip(*(x.split(_chunk(ours)) for x in (ours, theirs, targets)), strict=True):
            ours_log, theirs_log = a.float().log_softmax(-1), b.float().log_softmax(-1)
            probability = theirs_log.exp()
            # Tokens of probability zero in the original add nothing, even where 0 x infinity would be NaN.
            terms = torch.where(probability > 0, probability * (theirs_log - ours_log), 0.0)
            divergences.append(terms.sum(-1).clamp_min(0).cpu())
            agreements += int((a.argmax(-1) == b.argmax(-1)).sum())
            loss.append(-ours_log.gather(1, t[:, None]))
            original_loss.append(-theirs_log.gather(1, t[:, None]))
        losses.append(torch.cat(loss)[:-1].double().mean().item())
        original_losses.append(torch.cat(original_loss)[:-1].double().mean().item())
        if progress is not None:
            progress(done, len(rows))
    kl = torch.cat(divergences).double()
    rank = max(0, math.ceil(0.99 * len(kl)) - 1)
    return Comparison(
        perplexity=math.exp(sum(losses) / len(losses)),
        original_perplexity=math.exp(sum(original_losses) / len(original_losses)),
        kl_mean=kl.mean().item(),
        kl_p99=kl.sort().values[rank].item(),
        top1_agreement=agreements / len(kl),
    )


def _logits(model: Any, row: Tensor) -> Tensor:
    device = next(model.parameters()).device
    logits: Tensor = model(input_ids=row[None].to(device), use_cache=False).logits[0]
    return logits


def _chunk(logits: Tensor) -> int:
    return max(1, _CHUNK_ELEMENTS // logits.shape[-1])


# --- models and texts by name ----------------------------------------------------------------------------------------


def evaluate(
    model: str | Path,
    data: str | Path,
    *,
    against: str | Path | None = None,
    window: int = 1024,
    windows: int | None = None,
    activations: ActivationChoice = "auto",
    bos: bool = False,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    token: str | bool | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Load a model, and the original where one is named, and measure them on a text.

    Args:
        model: folder or hub id that ``from_pretrained`` loads.
        data: a text file in UTF-8.
        against: folder or hub id of the original; None compares with nothing.
        window: tokens a window, at least 2.
        windows: how many windows from the start of the text; all of them by default.
        activations: ``"fp4"`` quantizes the activations of all layers (of FP8 layers to FP8), ``"model"`` those of
            none, ``"auto"`` leaves it to the backends.
        bos: start every window with the tokenizer's BOS token, without which some models (Gemma) predict nothing.
        dtype: torch's name of one; ``"auto"`` is float32 on a CPU, where it is also the fastest, else the checkpoint's.
        device: as ``device_map`` of ``from_pretrained``; ``"auto"`` is the GPU where there is one.
        revision: branch, tag or commit of the model.
        token: token of the hub, for both models.
        trust_remote_code: run model code that comes with the checkpoints.
        progress: called with the number of windows done and in all.

    Raises:
        ValueError: what :func:`compare` raises, no such file, dtype or device, no BOS token, or a model whose
            configuration contradicts its weights.
    """
    if activations not in ("auto", "fp4", "model"):
        raise ValueError(f"activations is {activations!r}; expected 'auto', 'fp4' or 'model'")
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"dtype is {dtype!r}; expected 'auto', 'float32', 'bfloat16' or 'float16'")
    text, described = _read_text(Path(data))
    hub = {"token": checked_token(token), "trust_remote_code": trust_remote_code}
    for source, version in ((model, revision), (against, None)):
        if source is not None:
            headers, _ = open_headers(source, revision=version, token=token)
            refuse_endless(headers.config, len(headers.tensors))
    tokenizer = _tokenizer(model, against, revision, hub)
    if bos and tokenizer.bos_token_id is None:
        raise ValueError(f"the tokenizer of {model} has no BOS token to start windows with")
    first = tokenizer.bos_token_id if bos else None
    # The text is longer than the model's context, which the tokenizer would warn of, but it is cut into windows.
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    rows = split_windows(ids, window, windows, first)  # refuses before anything large is loaded
    used: dict[str, Any] = {"window": window, "windows": windows, "first": first, "progress": progress}

    place = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    options: dict[str, Any] = {
        "dtype": ("float32" if place == "cpu" else "auto") if dtype == "auto" else dtype,
        "device_map": "auto" if place == "cuda" else place,
        **hub,
    }
    measured = _load(model, options | {"revision": revision})
    set_activations(measured, activations)
    comparison = None
    if against is not None:
        comparison = compare(measured, _load(against, options), ids, **used)
    return Evaluation(
        model=str(model),
        data=described | {"tokens": rows.numel(), "bos": bos},
        window=window,
        windows=len(rows),
        dtype=str(measured.dtype).removeprefix("torch."),
        device=str(measured.device),
        perplexity=comparison.perplexity if comparison else perplexity(measured, ids, **used),
        runs=describe_activations(measured),
        against=None if against is None else str(against),
        comparison=comparison,
    )


def _tokenizer(model: str | Path, against: str | Path | None, revision: str | None, hub: dict[str, Any]) -> Any:
    """The tokenizer of the model, or of the original where the model has none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model, revision=revision, **hub)
    except MemoryError:
        raise
    except Exception as error:  # a configuration that is refused raises an error of its own class
        if against is None:
            said = " ".join(str(error).split())[:300] or type(error).__name__
            raise ValueError(
                f"{model} has no tokenizer that can be read ({said}); copy the original's into it, or name the "
                "original to compare with"
            ) from error
        return AutoTokenizer.from_pretrained(against, **hub)


def _load(source: str | Path, options: dict[str, Any]) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(source, **options).eval()
    except Exception as error:  # weights of other shapes, a configuration that is refused: each has its own error
        if is_out_of_memory(error) or isinstance(error, (OSError, ImportError)):
            raise
        said = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{source} cannot be loaded: {said}") from error
    return model


def _read_text(path: Path) -> tuple[str, dict[str, Any]]:
    if not path.is_file():
        raise ValueError(f"{path} is no file; expected a text to measure perplexity on")
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8"), {"name": path.name, "sha256": hashlib.sha256(raw).hexdigest()}
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}") from error
