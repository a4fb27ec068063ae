"""What is checked of a quantized model of any class of Transformers' auto mappings, and the table of docs/models.md.

``PYTHONPATH=src python tests/helpers/model_classes.py docs/models.md`` writes the table anew.
"""

from __future__ import annotations

import datetime
import platform
import re
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny_models import class_named, inputs_of, tensors_in, tiny_config
from torch import Tensor, nn
from transformers import PreTrainedModel

from fp4 import FPQuantConfig
from fp4.nn import FP4Experts, PackedWeight

#: Under this version every class can be set up; others may want other configurations of some.
TRIED_WITH = "5.23."
SCHEMES = ("nvfp4", "mxfp4")
# Modules whose matrices are looked up or added instead of multiplied with, and convolutions.
_NO_PRODUCT = (nn.Embedding, nn.modules.conv._ConvNd, nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


@dataclass
class Result:
    """What became of a class in one scheme.

    Attributes:
        share: fraction of the parameters outside of embeddings that is quantized.
        kept: number of the layers that are dense, by the reason.
    """

    share: float
    kept: Counter[str]


class NotComparable(Exception):  # noqa: N818  (no error: the reason to skip a class)
    """Why the outputs of a class cannot be compared."""


def check_class(name: str, scheme: str, folder: Path) -> Result:
    """Quantize a tiny model of a class on the fly, and check what others see of it.

    Raises:
        NotComparable: the outputs of the class are random.
        AssertionError: a check fails.
    """
    model_class = class_named(name)
    if model_class is None:
        raise NotComparable(f"Transformers {transformers.__version__} has no {name}")
    try:
        dense, inputs = _dense(model_class)
        repeated = [outputs_of(dense, inputs) for _ in range(2)]
        dense.save_pretrained(folder / "dense")
    except Exception as error:  # whatever Transformers' classes raise for the tiny configuration
        if transformers.__version__.startswith(TRIED_WITH):
            raise
        raise NotComparable(
            f"in Transformers {transformers.__version__} its tiny model does not run: {error}"
        ) from error
    if not same(*repeated):
        raise NotComparable("its forward pass is random")
    options: dict[str, Any] = {"attn_implementation": "eager", "dtype": torch.float32}
    config = FPQuantConfig(scheme=scheme)
    model: Any = model_class.from_pretrained(folder / "dense", quantization_config=config, **options)
    assert_named(dense, model)
    assert_looks_dense(dense, model)
    expected = outputs_of(model, inputs)
    model.save_pretrained(folder / "packed")
    again: Any = model_class.from_pretrained(folder / "packed", **options)
    assert_looks_dense(dense, again)
    assert_same_state(model, again)
    report, bound = model.hf_quantizer.report, accumulation_error(model)
    # To the bit they need not be the same: how sums are ordered depends on where tensors lie in memory.
    for found, wanted in zip(outputs_of(again, inputs), expected, strict=True):
        assert error_of(found, wanted) <= bound
    model.dequantize()
    assert not any(isinstance(module, (PackedWeight, FP4Experts)) for module in model.modules())
    for found, wanted in zip(expected, outputs_of(model, inputs), strict=True):
        assert error_of(found, wanted) <= bound, (error_of(found, wanted), bound)
    return Result(report.share_of_blocks, Counter(report.reasons.values()))


def _dense(model_class: type[PreTrainedModel]) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    dense: Any = model_class(tiny_config(model_class)).eval()
    with torch.no_grad():
        for parameter in dense.parameters():  # Many are initialized with zeros, which would hide what is wrong.
            if parameter.is_floating_point() and not bool(parameter.any()):
                parameter.normal_(0, 0.02)
    return dense, inputs_of(dense)


def outputs_of(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    """The floating-point tensors that a model returns, in their order; random numbers start from the same seed."""
    torch.manual_seed(1)
    with torch.no_grad():
        return [tensor.clone() for tensor in tensors_in(model.eval()(**inputs))]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    """Whether the outputs of two models are the same to the bit."""
    return len(a) == len(b) and all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(a, b, strict=True))


def error_of(found: Tensor, wanted: Tensor) -> float:
    """The relative error in the Frobenius norm, of finite values."""
    finite = wanted.isfinite()
    assert torch.equal(finite, found.isfinite())
    found, wanted = found[finite].double(), wanted[finite].double()
    return float((found - wanted).norm() / wanted.norm().clamp_min(1e-30))


def accumulation_error(model: nn.Module) -> float:
    """A bound of the relative error that another order of summation gives: K · 2^-24 for each packed product.

    Both sides round, and a rotation adds a product with its matrix, which makes four times that.
    """
    columns = [module.in_features for module in model.modules() if isinstance(module, PackedWeight)]
    return 4 * sum(columns) * 2.0**-24 + 2.0**-20


def assert_looks_dense(dense: PreTrainedModel, model: PreTrainedModel) -> None:
    """Dtype, dtypes of parameters and number of parameters are those of the dense model."""
    assert model.dtype == dense.dtype
    assert model.num_parameters() == dense.num_parameters()
    wanted = {name: parameter.dtype for name, parameter in dense.named_parameters()}
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2].startswith("packed_"):
            assert parameter.dtype == torch.uint8, name
        else:
            assert parameter.dtype == wanted[name], name


def assert_same_state(model: nn.Module, again: nn.Module) -> None:
    """All parameters, buffers and rotations are the same to the bit."""
    for kind in ("named_parameters", "named_buffers"):
        found, wanted = dict(getattr(again, kind)()), dict(getattr(model, kind)())
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert torch.equal(found[name].nan_to_num(), tensor.nan_to_num()), name
    for name, module in model.named_modules():
        if isinstance(module, PackedWeight):
            assert again.get_submodule(name).rotation is module.rotation, name


def assert_named(dense: nn.Module, model: PreTrainedModel) -> None:
    """Every layer and every stack of matrices is packed, or has a reason why it is not."""
    reasons = model.hf_quantizer.report.reasons
    for name, module in dense.named_modules():
        if isinstance(module, _NO_PRODUCT):
            continue
        own = {key: parameter for key, parameter in module.named_parameters(recurse=False) if parameter.ndim in (2, 3)}
        is_layer = "weight" in own or "Expert" in type(module).__name__
        if own and is_layer and not isinstance(model.get_submodule(name), (PackedWeight, FP4Experts)):
            assert name in reasons, f"{name} ({type(module).__name__}) is dense, and nothing says why"


# --- the table -------------------------------------------------------------------------------------------------------


def _row(name: str) -> str:
    cells: list[str] = []
    kept: Counter[str] = Counter()
    for scheme in SCHEMES:
        with tempfile.TemporaryDirectory() as folder:
            try:
                result = check_class(name, scheme, Path(folder))
            except NotComparable as reason:
                return f"| {name} | | | not tried: {reason} |"
        cells.append(f"{result.share:.0%}")
        kept |= Counter(_in_table(reason) for reason in result.kept.elements())
    unusual = [f"{reason} ({count})" for reason, count in sorted(kept.items()) if not _is_usual(reason)]
    return f"| {name} | {' | '.join(cells)} | {'; '.join(unusual)} |"


def _in_table(reason: str) -> str:
    """A reason without the numbers that differ from layer to layer."""
    if "is not a multiple of" in reason:
        return "columns that blocks do not divide"
    return re.sub(r"its rows, \d+, are fewer than", "fewer rows than", reason)


def _is_usual(reason: str) -> bool:
    return reason in ("output embedding", "classification or regression head", "router", "tied to another weight")


def write_table(path: Path) -> None:
    """Check all classes and write the page with the table."""
    from classes_tried import CLASSES

    rows = [_row(name) for name in CLASSES]
    versions = f"Transformers {transformers.__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    page = f"""# Models

`tests/integrations/transformers/test_model_classes.py` tries {len(CLASSES)} classes of Transformers' auto mappings with
tiny random weights, quantized on the fly in NVFP4 and MXFP4. Every layer is packed or named with a reason, the outputs
are those of the dequantized model but for the order of summation, saving and loading changes no bit, and dtype and
number of parameters are the dense model's. The columns give the share of the parameters outside of embeddings that is
quantized in such a tiny model; in the model's own size it is larger. The last one counts what stays dense beside output
embeddings, heads, routers and tied weights.

Written by `tests/helpers/model_classes.py` with {versions}, {datetime.date.today().isoformat()}.

| class | NVFP4 | MXFP4 | what stays dense |
|---|---|---|---|
"""
    path.write_text(page + "\n".join(rows) + "\n")


if __name__ == "__main__":
    write_table(Path(sys.argv[1]))
