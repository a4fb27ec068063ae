"""Calibration on images: rows of a recipe through the model's processor, and blocks on what the towers make of them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import transformers
from small_models import TEXT, tokenizer
from special_models import TOWERS, save_model
from torch import Tensor

import fp4
from fp4.calibration.data import load_samples
from fp4.checkpoint.io.headers import Checkpoint
from fp4.methods import METHODS, Block, LayerResult
from fp4.pipeline.block_inputs import capture, output_of, result_form
from fp4.pipeline.calibrate import BlockCalibration
from fp4.pipeline.skeleton import Skeleton

PIL = pytest.importorskip("PIL.Image")
CPU = torch.device("cpu")
IMAGE = 259
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}\n{% endfor %}"
)


def save_llava(folder: Path, template: str | None = TEMPLATE) -> Any:
    """Write a small LLaVA with a processor; an image of any size takes 16 tokens."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    def make() -> Any:
        model = TOWERS["llava"][0]()
        model.config.image_token_index = model.config.image_token_id = IMAGE
        return model

    model = save_model(make, folder)
    (folder / "chat_template.jinja").unlink()  # that of the tokenizer, which has no images
    side = {"height": 16, "width": 16}
    words = tokenizer(template)
    words.add_special_tokens({"additional_special_tokens": ["<image>"]})
    words.image_token = "<image>"
    assert words.convert_tokens_to_ids("<image>") == IMAGE
    images = CLIPImageProcessorPil(size=side, crop_size=side)
    processor = transformers.LlavaProcessor(
        images,
        words,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )
    processor.save_pretrained(folder)
    return model


def save_rows(folder: Path, rows: list[dict[str, Any]], **recipe: Any) -> Path:
    """Write a recipe of a jsonl file, and the images that its rows name."""
    random = numpy.random.default_rng(0)
    for row in rows:
        for name in row.get("pictures", []):
            if not (folder / name).exists():
                PIL.fromarray(random.integers(0, 256, (20, 24, 3), numpy.uint8)).save(folder / name)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    amounts = {"max_samples": 8, "max_seq_len": 60, "min_token_length": 4, "oversample_ratio": 1} | recipe
    entry = {"path": "rows.jsonl", "images": "pictures"}
    path = folder / "recipe.yaml"
    path.write_text(json.dumps({"datasets": [entry], "calibration": amounts}))
    return path


def texts(count: int) -> list[dict[str, Any]]:
    return [{"text": TEXT[7 * n : 7 * n + 20], "pictures": [f"{n}.png"]} for n in range(count)]


# --- rows


def test_a_row_is_read_as_the_processor_reads_it(tmp_path: Path) -> None:
    save_llava(tmp_path)
    processor = transformers.AutoProcessor.from_pretrained(tmp_path)
    recipe = save_rows(tmp_path, [{"text": "What is it?", "pictures": ["a.png", "b.png"]}])
    found = load_samples(recipe, processor.tokenizer, processor=lambda: processor)
    images = [PIL.open(tmp_path / name) for name in ("a.png", "b.png")]
    expected = processor(
        text="<user><image><image>What is it?", images=images, return_tensors="pt", add_special_tokens=False
    )
    assert torch.equal(found.tokens[0], expected["input_ids"][0])
    assert int((found.tokens[0] == IMAGE).sum()) == 32
    assert found.inputs[0].keys() == {"pixel_values"}
    assert torch.equal(found.inputs[0]["pixel_values"], expected["pixel_values"])
    assert "1 samples of at most 60 tokens, 1 with images" in found.description
    other = dataclasses.replace(found, inputs=[{"pixel_values": expected["pixel_values"] + 1}])
    assert other.sha256 != found.sha256


def test_turns_name_the_places_of_images(tmp_path: Path) -> None:
    save_llava(tmp_path)
    processor = transformers.AutoProcessor.from_pretrained(tmp_path)
    parts = [{"type": "text", "text": "Look: "}, {"type": "image"}, {"type": "text", "text": "?"}]
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": [{"type": "text", "text": "A fox"}]}]
    recipe = save_rows(tmp_path, [{"messages": turns, "pictures": ["a.png"]}])
    found = load_samples(recipe, processor.tokenizer, processor=lambda: processor)
    assert processor.tokenizer.decode(found.tokens[0]) == f"<user>Look: {'<image>' * 16}?<assistant>A fox"
    recipe = save_rows(tmp_path, [{"messages": turns, "pictures": ["a.png", "b.png"]}])
    with pytest.raises(ValueError, match=r"line 1: its turns have places for 1 images, and its column pictures has 2"):
        load_samples(recipe, processor.tokenizer, processor=lambda: processor)


def test_images_are_never_cut_and_text_after_them_is(tmp_path: Path) -> None:
    save_llava(tmp_path, template=None)
    processor = transformers.AutoProcessor.from_pretrained(tmp_path)
    rows = [{"text": "x" * 50, "pictures": ["a.png"]}]
    found = load_samples(save_rows(tmp_path, rows, max_seq_len=20), processor.tokenizer, processor=lambda: processor)
    assert len(found.tokens[0]) == 20
    assert found.tokens[0][:16].tolist() == [IMAGE] * 16
    with pytest.raises(ValueError, match="gave no sample of at least 4 tokens"):
        load_samples(save_rows(tmp_path, rows, max_seq_len=10), processor.tokenizer, processor=lambda: processor)


def test_mistakes_are_named_with_their_line(tmp_path: Path) -> None:
    save_llava(tmp_path)
    processor = transformers.AutoProcessor.from_pretrained(tmp_path)
    recipe = save_rows(tmp_path, texts(1))
    (tmp_path / "0.png").write_text("no image")
    with pytest.raises(ValueError, match=r"line 1: its image 0\.png cannot be read"):
        load_samples(recipe, processor.tokenizer, processor=lambda: processor)
    processor.chat_template = "{% for message in messages %}{{ message['role'] }}{% endfor %}"
    recipe = save_rows(tmp_path, [{"text": "What?", "pictures": ["c.png"]}])
    with pytest.raises(ValueError, match=r"line 1: the chat template has no place for images: it writes no <image>"):
        load_samples(recipe, processor.tokenizer, processor=lambda: processor)
    recipe.write_text('{"datasets": [{"path": "rows.jsonl", "images": "photos"}]}')
    with pytest.raises(ValueError, match="it has no column 'photos'; its columns are text, pictures"):
        load_samples(recipe, processor.tokenizer, processor=lambda: processor)


def test_text_alone_is_read_where_the_model_has_no_processor(tmp_path: Path) -> None:
    recipe = save_rows(tmp_path, texts(2))
    found = load_samples(recipe, tokenizer())
    assert found.inputs == []
    assert [len(tokens) for tokens in found.tokens] == [20, 20]
    assert found.warnings[0] == (
        "the images of column 'pictures' of rows.jsonl are not used: the model has no processor of images"
    )

    def missing() -> Any:
        raise ValueError("its processor cannot be loaded (no torchvision)")

    found = load_samples(recipe, tokenizer(), processor=missing)
    assert found.warnings[0].endswith("are not used: its processor cannot be loaded (no torchvision)")


# --- blocks


def true_inputs(model: Any, names: list[str], read: dict[str, Tensor]) -> tuple[list[Tensor], Tensor]:
    """What the model passes to each of its blocks, and what the last one returns, when all of it runs."""
    seen: list[Tensor] = []
    last: list[Tensor] = []
    blocks = [model.get_submodule(name) for name in names]
    hooks = [block.register_forward_pre_hook(lambda block, args: seen.append(args[0].clone())) for block in blocks]
    hooks.append(blocks[-1].register_forward_hook(lambda block, args, result: last.append(output_of(result).clone())))
    with torch.no_grad():
        model(**read, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen, last[0]


def reads(family: str) -> dict[str, Tensor]:
    """The inputs of one image and some text for a model that reads no processor's files."""
    noise = torch.Generator().manual_seed(0)
    if family == "llava":
        ids = torch.tensor([[10, 11, *[3] * 16, *range(20, 30)]])
        return {"input_ids": ids, "pixel_values": torch.randn(1, 3, 16, 16, generator=noise)}
    ids = torch.tensor([[10, 5, *[3] * 4, 6, *range(20, 30)]])
    if family == "gemma3":
        pixels = torch.randn(1, 3, 16, 16, generator=noise)
        return {"input_ids": ids, "pixel_values": pixels, "token_type_ids": (ids == 3).long()}
    if family == "smolvlm":
        return {"input_ids": ids, "pixel_values": torch.randn(1, 1, 3, 16, 16, generator=noise)}
    return {
        "input_ids": ids,
        "pixel_values": torch.randn(16, 3 * 2 * 4 * 4, generator=noise),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": (ids == 3).long(),
    }


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl", "gemma3", "smolvlm"])
def test_blocks_get_what_the_whole_model_gives_them(family: str, tmp_path: Path) -> None:
    """Qwen3-VL adds features of the image after its first block too."""
    dense = save_model(TOWERS[family][0], tmp_path)
    read = reads(family)
    skeleton = Skeleton(Checkpoint.open(tmp_path), torch.float32)
    ids, others = read["input_ids"], {name: tensor for name, tensor in read.items() if name != "input_ids"}
    with skeleton.outside_filled(CPU, [ids], towers=True):
        with skeleton.filled(skeleton.blocks[0], CPU):
            form = result_form(skeleton, ids[:1, :8])
        hidden, calls = capture(skeleton, ids, form, others)
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())
    expected, last = true_inputs(dense, skeleton.blocks, read)
    text = {name: read[name] for name in ("input_ids", "token_type_ids") if name in read}
    with_text, _ = true_inputs(dense, skeleton.blocks, text)
    assert not torch.allclose(expected[0], with_text[0]), "the image makes no difference"
    for number, (name, call) in enumerate(zip(skeleton.blocks, calls, strict=True)):
        if call.added is not None:
            hidden = hidden + call.added
        torch.testing.assert_close(hidden, expected[number])
        with skeleton.filled(name, CPU) as block, torch.no_grad():
            hidden = output_of(block(hidden, *call.args, **call.kwargs))
    torch.testing.assert_close(hidden, last)
    assert [call.added is not None for call in calls] == [False, family == "qwen3_vl"]


def test_a_recipe_of_images_calibrates_the_decoder_on_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = save_llava(tmp_path / "model")
    seen: list[Tensor] = []

    def spy(block: Block, options: Any) -> dict[str, LayerResult]:
        if not seen:
            seen.extend(block.inputs[batch].clone() for batch in range(len(block.inputs)))
        return METHODS["rtn"].run(block, METHODS["rtn"].options())

    monkeypatch.setitem(METHODS, "gptq", dataclasses.replace(METHODS["gptq"], run=spy))
    data = tmp_path / "data"
    data.mkdir()
    recipe = save_rows(data, [*texts(3), {"text": "No picture, only words.", "pictures": []}])
    report = fp4.quantize(tmp_path / "model", tmp_path / "out", "nvfp4a16", "gptq", recipe, device="cpu")
    assert "4 samples of at most 60 tokens, 3 with images" in report["data"]["description"]
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "model")
    samples = load_samples(recipe, processor.tokenizer, processor=lambda: processor)
    name = next(name for name, _ in dense.named_modules() if name.endswith("language_model.layers.0"))
    assert len(seen) == 4
    for hidden, tokens, others in zip(seen, samples.tokens, samples.inputs, strict=True):
        expected, _ = true_inputs(dense, [name], {"input_ids": tokens[None], **others})
        torch.testing.assert_close(hidden, expected[0])


def test_an_interrupted_job_goes_on_with_the_same_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_llava(tmp_path / "model")
    data = tmp_path / "data"
    data.mkdir()
    arguments = (tmp_path / "model", tmp_path / "out", "nvfp4", "gptq", save_rows(data, texts(4)))
    fp4.quantize(arguments[0], tmp_path / "whole", *arguments[2:], device="cpu")
    original = BlockCalibration._quantize

    def interrupted(self: BlockCalibration, number: int, *rest: Any) -> Any:
        if number == 1:
            raise KeyboardInterrupt
        return original(self, number, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(BlockCalibration, "_quantize", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fp4.quantize(*arguments, device="cpu")
    for name in ("0.png", "1.png"):
        (data / name).unlink()  # the samples are kept with the unfinished work
    fp4.quantize(*arguments, device="cpu")
    file = "model.safetensors"
    assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
