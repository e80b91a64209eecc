"""The ONNX file: ONNX Runtime gives what torch gives at any batch, the file alone is enough, no machine is named."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, numpy_helper
from sources import SIZE, classifier, images, source_of
from torch import Tensor, nn
from vits import small

import miram
from miram.engine.errors import RunFailed, UserError
from miram.finetune.export import int8, onnx_file
from miram.finetune.export.onnx_file import FILE, exported, networked, saved, write_onnx
from miram.finetune.export.parity import Written, agreement
from miram.finetune.export.source import Source
from miram.finetune.peft import METHODS, apply
from miram.finetune.segment.models import MODELS, NEEDS_ENCODER, build


@pytest.fixture(scope="module")
def made() -> tuple[Source, Any]:
    source = classifier()
    return source, exported(networked(source, None), source)


@pytest.fixture(scope="module")
def file(made: tuple[Source, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onnx")
    assert saved(made[1], folder, None) == [FILE]
    return folder / FILE


def by_onnxruntime(path: Path, batch: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"images": batch.numpy()})
    return torch.from_numpy(found)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_onnx_runtime_gives_what_torch_gives_at_any_batch(made: tuple[Source, Any], file: Path, count: int) -> None:
    batch = images(count)
    wanted = made[0].module(batch)
    torch.testing.assert_close(by_onnxruntime(file, batch), wanted, atol=1e-4, rtol=0)
    torch.testing.assert_close(onnx_file.onnx_runner(file)(batch), wanted, atol=1e-4, rtol=0)


def test_the_file_alone_says_how_it_is_used(file: Path) -> None:
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    said = {name: json.loads(text) for name, text in session.get_modelmeta().custom_metadata_map.items()}
    assert said["classes"] == ["no", "yes"]
    assert (said["mean"], said["std"], said["image_size"]) == ([0.2], [0.3], [64, 32])
    assert (said["temperature"], said["thresholds"], said["source"]) == (1.7, {"image": [0.4]}, "d" * 64)
    ((given,), (got,)) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.shape[1:], got.name, got.shape[1:]) == ("images", [1, 64, 32], "logits", [2])
    assert isinstance(given.shape[0], str)


def texts(message: Any) -> Iterator[str]:
    """Every string of a protobuf message and of those inside it."""
    for kind, value in message.ListFields():
        many = value if kind.is_repeated else [value]
        for one in many:
            if kind.message_type is not None:
                yield from texts(one)
            elif isinstance(one, str):
                yield one


def test_the_file_names_no_place_of_the_machine_that_wrote_it(file: Path) -> None:
    raw = file.read_bytes()
    for place in (Path(miram.__file__).parent, Path(torch.__file__).parent.parent, Path.home()):
        assert str(place).encode() not in raw
    model = onnx.load(file)
    assert not [text for text in texts(model) if ".py" in text or "site-packages" in text]
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)


def test_weights_lie_beside_the_file_where_they_are_too_large_for_it(
    made: tuple[Source, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_file, "LIMIT", 1000)
    assert saved(made[1], tmp_path, None) == [FILE, f"{FILE}.data"]
    assert (tmp_path / f"{FILE}.data").stat().st_size > 10 * (tmp_path / FILE).stat().st_size > 0
    onnx_file.checked(tmp_path / FILE)
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    torch.testing.assert_close(by_onnxruntime(moved / FILE, images(3)), made[0].module(images(3)), atol=1e-4, rtol=0)


class Counting(nn.Module):
    """Turns the batch into a number, so that torch writes that of the example."""

    def forward(self, batch: Tensor) -> Tensor:
        return batch.new_ones(len(batch), 1) + batch.mean((1, 2, 3))[:, None] * len(batch)


def test_a_network_that_only_takes_one_batch_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match=r"torch\.onnx cannot express|turns the batch into a number"):
        write_onnx(source_of(Counting()), tmp_path)


def test_tokens_are_merged_in_plain_vits_alone(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--merge-tokens takes a plain ViT, and this segmenter is none"):
        write_onnx(source_of(nn.Identity(), "segmenter"), tmp_path, 4)
    with pytest.raises(UserError, match="this classifier is none"):
        write_onnx(source_of(nn.Identity(), "classifier"), tmp_path, 4)


def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"needs onnxscript, which is not here: pip install 'miram\[onnx\]'"):
        write_onnx(classifier(), tmp_path)


def test_every_matrix_of_a_linear_layer_is_of_eight_bits_for_onnx_runtime_and_nothing_else_is(
    made: tuple[Source, Any], file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def written_before(_: Source, folder: Path) -> Written:
        return Written([Path(shutil.copy(file, folder)).name], None)

    monkeypatch.setattr(int8, "write_onnx", written_before)
    source = made[0]
    written = int8.write_int8(source, tmp_path, "onnxruntime")
    assert written.files == [int8.ONNX]
    model = onnx.load(tmp_path / int8.ONNX)
    narrow = [one for one in model.graph.initializer if one.data_type == TensorProto.UINT8 and len(one.dims) == 2]
    assert sorted(numpy_helper.to_array(one).size for one in narrow) == sorted(
        layer.weight.numel() for layer in source.module.modules() if isinstance(layer, nn.Linear)
    )
    assert {"classes", "mean", "thresholds"} <= {one.key for one in model.metadata_props}
    assert b"site-packages" not in (tmp_path / int8.ONNX).read_bytes()
    assert written.runner is not None
    with torch.inference_mode():
        wanted = source.module(images(4))
    said = written.runner(images(4))
    assert 0 < (said - wanted).abs().max() < 0.1 * wanted.abs().max()
    assert torch.equal(written.runner(images(4)[2:3]), said[2:3]), "what is said of an image depends on its neighbours"
    facts = written.facts["int8_onnxruntime"]
    assert facts["bytes"] == (tmp_path / int8.ONNX).stat().st_size < facts["float32_bytes"]


def agrees(written: Written, source: Source) -> None:
    assert written.runner is not None
    for count in (1, 2, 5):
        batch = images(count, source.image_size)
        with torch.inference_mode():
            wanted = source.module(batch)
        torch.testing.assert_close(written.runner(batch), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_merged_tokens_are_written_as_torch_merges_them(tmp_path: Path) -> None:
    source = classifier()
    written = write_onnx(source, tmp_path, 2)
    assert written.tolerance is None
    assert written.facts["onnx"]["merge_tokens"] == 2
    assert written.runner is not None
    assert written.twin is not None
    inputs = {"noise": images(5)}
    assert agreement(written.twin, written.runner, inputs).apart == 0
    agrees(written, replace(source, module=networked(source, 2)))
    off = (written.runner(images(5)) - source.module(images(5))).abs().max() if written.runner else 0
    assert off > 1e-3, "nothing was merged"


@pytest.mark.slow
@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if not method.merges])
def test_every_method_that_does_not_merge_is_written_as_it_is(method: str, tmp_path: Path) -> None:
    options = {"share_every": 1} if method == "dvpt" else {}
    tuned = apply(small(image=SIZE), method, **options)
    tuned.set_head(2)
    nn.init.normal_(tuned.head.weight)
    source = source_of(tuned, "classifier")
    agrees(write_onnx(source, tmp_path), source)


@pytest.mark.slow
@pytest.mark.parametrize("model", list(MODELS))
def test_every_segmentation_model_is_written(model: str, tmp_path: Path) -> None:
    small_options = {
        "light": {"width": 16},
        "unetr": {"feature_size": 4},
        "unet": {"channels": [4, 4, 8, 8, 8]},
        "mdsa_unet": {"dims": [32, 64, 64]},
    }
    torch.manual_seed(0)
    tuned = apply(small(image=SIZE, depth=4), "linear") if model in NEEDS_ENCODER else None
    network = build(model, small_options.get(model, {}), tuned, 1, 3)
    source = source_of(network, "segmenter")
    agrees(write_onnx(source, tmp_path), source)
