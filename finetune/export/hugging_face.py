"""A folder that transformers loads by itself.

OUT/config.json  model.safetensors     ViTModel, or ViTForImageClassification of a classifier (hugging_face_vit.py)
OUT/preprocessor_config.json           ViTImageProcessor, of 8-bit pictures
OUT/mae/…                              ViTMAEForPreTraining, where there is one (hugging_face_mae.py)

Legend: B images of (C, H, W); N patches, D width of tokens.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from ...engine.errors import UserError
from ...pretrain.encoder import Encoder
from .hugging_face_mae import MAE_FILES, NoMae, write_mae
from .hugging_face_vit import WEIGHTS, read, refuse_foreign, renamed, save, shape_of
from .parity import Written
from .source import Source
from .timm_folder import plain

FILES = (WEIGHTS, "config.json", "preprocessor_config.json")


def write_hf(source: Source, folder: Path) -> Written:
    """Write what `transformers` loads.

    Raises:
        UserError: transformers is not installed, or its ViT cannot hold this encoder.
    """
    try:
        from transformers import ViTImageProcessor
    except ImportError as error:
        raise UserError("--to hf needs transformers: pip install transformers") from error
    vit = plain(source, "hf")
    refuse_foreign(vit, source.kind == "classifier")
    save(model_of(source, vit), folder)
    ViTImageProcessor(**processor_of(source)).save_pretrained(folder)
    if source.head is not None:
        return Written([*FILES], Loaded(folder, True), [EIGHT_BITS], usage=CLASSIFIER)
    files, notes, facts = [*FILES], [EIGHT_BITS, pooling(vit)], {}
    try:
        said = write_mae(source, folder)
        files, notes, facts = [*files, *MAE_FILES], [*notes, *said["notes"]], {"mae": said}
    except NoMae as why:
        notes.append(f"There is no ViTMAEForPreTraining beside it: {why}.")
    every_token = cast(Any, source.vit).forward_features
    usage = ENCODER + PRETRAINING * bool(facts)
    return Written(files, Loaded(folder, False), notes, facts, reference=every_token, usage=usage)


def model_of(source: Source, vit: Encoder) -> Any:
    """The model of transformers that computes the same."""
    from transformers import ViTConfig, ViTForImageClassification, ViTModel

    state, config = dict(renamed(vit)), ViTConfig(**shape_of(vit), **labels_of(source))
    if source.head is None:
        model: Any = ViTModel(config, add_pooling_layer=False)
    else:
        model = ViTForImageClassification(config)
        state = {f"vit.{name}": tensor for name, tensor in state.items()}
        state |= {f"classifier.{name}": tensor for name, tensor in source.head.state_dict().items()}
    model.load_state_dict(state)
    return model


class Loaded:
    """The folder as its user reads it: images -> last_hidden_state (B, 1 + N, D), or logits (B, w)."""

    def __init__(self, folder: Path, classifies: bool):
        self.folder, self.classifies = folder, classifies

    @cached_property
    def model(self) -> Any:
        """Read once it is asked for."""
        from transformers import ViTForImageClassification, ViTModel

        if self.classifies:
            return read(ViTForImageClassification, self.folder)
        return read(ViTModel, self.folder, add_pooling_layer=False)

    def __call__(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> every token, or logits."""
        found = self.model(images)
        out: Tensor = found.logits if self.classifies else found.last_hidden_state
        return out


def labels_of(source: Source) -> dict[str, Any]:
    """What ViTConfig says of a classifier."""
    if source.head is None:
        return {}
    problem = "single_label" if source.kind_of_task in ("binary", "multiclass") else "multi_label"
    names = dict(enumerate(source.outputs))
    ids = {name: number for number, name in names.items()}
    return {"id2label": names, "label2id": ids, "problem_type": f"{problem}_classification"}


def processor_of(source: Source) -> dict[str, Any]:
    """What ViTImageProcessor does."""
    height, width = source.image_size
    return {
        "do_resize": True,
        "size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(source.mean),
        "image_std": list(source.std),
    }


# ---------------------------------------------------------------------------------------------- what is said


EIGHT_BITS = (
    "preprocessor_config.json is of 8-bit pictures: it divides by 255 and squeezes the whole picture into the frame. "
    "Of 16-bit films divide by the largest value of their format, and keep their shape."
)
CLASSIFIER = """
from transformers import ViTForImageClassification
model = ViTForImageClassification.from_pretrained("FOLDER").eval()
logits = model(images).logits
"""
ENCODER = """
from transformers import ViTModel
model = ViTModel.from_pretrained("FOLDER", add_pooling_layer=False).eval()
tokens = model(images).last_hidden_state    # (batch, 1 + patches, width)
"""
PRETRAINING = """
from transformers import ViTMAEForPreTraining
autoencoder = ViTMAEForPreTraining.from_pretrained("FOLDER/mae").eval()
"""


def pooling(vit: Encoder) -> str:
    """How timm's features are had of the tokens."""
    tokens = "last_hidden_state" if getattr(vit, "pool_include_prefix", False) else "last_hidden_state[:, 1:]"
    how = {
        "": "last_hidden_state, every token: it pools nothing",
        "token": "last_hidden_state[:, 0]",
        "avg": f"{tokens}.mean(1)",
        "max": f"{tokens}.amax(1)",
        "avgmax": f"({tokens}.mean(1) + {tokens}.amax(1)) / 2",
    }.get(vit.global_pool, f"timm's pooling {vit.global_pool} of last_hidden_state")
    return (
        f"timm's features of this encoder are {how}. Load ViTModel with add_pooling_layer=False: a pooler was never "
        "trained, so pooler_output means nothing."
    )
