"""What an exported folder says of itself, to people and to programs.

OUT/README.md      front matter as model hubs read it, then words: release, use, input, data, parity, limits
OUT/export.json    {"schema", "miram", "format", "kind", "files": {NAME: sha256}, "source": {"digest", "method",
                   "provenance"}, "parity": {"largest_difference", "tolerance", "inputs", …} or null, "accuracy": {…} or
                   null, "data": [{"dataset", "licence", "terms", "used_for"}], "release", "intended_use", "limits",
                   "image_size", "channels", "mean", "std", "classes", "outputs", "temperature", "thresholds", …}

Neither holds a path, a host, or a patient: not even hashes of patients, which model.json has.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from ...engine.files import sha256, write_atomic, write_json
from ...pretrain.encoder import Encoder
from ...version import __version__
from .licences import FORBIDDEN, RESTRICTED, UNSTATED, forbids, never_trained, terms_of, unknown
from .parity import Parity, Written
from .source import Source

EXPORT = "miram.export/1"
CARD, README = "export.json", "README.md"

PURPOSE = {
    "encoder": "Research on images like those it learnt from: features for probes, tuning and retrieval.",
    "classifier": "Research on images like those it learnt from: it tells {task} as {classes}.",
    "segmenter": "Research on images like those it learnt from: it outlines {classes}.",
}
NO_DEVICE = "It is not a medical device: no decision about a patient may rest on it."
PROBABILITIES = {
    "binary": "softmax(logits / temperature)",
    "multiclass": "softmax(logits / temperature)",
    "multilabel": "sigmoid(logits / temperature), each output a question of its own",
    "ordinal": "p(above class j) = product over i <= j of sigmoid(logit_i / temperature)",
}
LIMITS = (
    "Other scanners, vendors, populations and ways of making pixels of films than those of its training change what it "
    "says; measure it on images of your own first.",
    "How certain it is was not measured on films that are damaged, of another view or of another modality.",
)


# ---------------------------------------------------------------------------------------------- terms of the data


def release_of(source: Source) -> str:
    """One sentence on whether the weights may be passed on; the strictest of the data decides."""
    terms = {terms_of(licence): None for licence in source.licences}
    names = ", ".join(dict.fromkeys(x["dataset"] for x in source.licences if terms_of(x) == RESTRICTED))
    if FORBIDDEN in terms:
        return (
            "DO NOT RELEASE. These weights learnt from EMBED, whose Research Use Agreement (clause 5) forbids to "
            "release models, weights or embeddings trained on any of it without written permission of Emory University "
            "School of Medicine."
        )
    if RESTRICTED in terms:
        return f"Restricted. These weights learnt from data for non-commercial research, or less ({names})."
    if UNSTATED in terms or not terms:
        return "Not known. The licence of some of the data is unknown; find out before you pass these weights on."
    return "The licences of the data that are known bind no weights; whoever releases them chooses theirs."


def front_matter(source: Source, form: str, files: Sequence[str] = ()) -> str:
    """YAML as model hubs read it; the licence is never guessed to be freer than the data's."""
    terms = {terms_of(licence) for licence in source.licences}
    bound = FORBIDDEN in terms, RESTRICTED in terms
    licence = {"license": "other", "license_name": "no-release" if bound[0] else "terms-of-the-data"}
    library = {"timm": "timm", "hf": "transformers"}.get(form) or (
        "onnx" if any(name.endswith(".onnx") for name in files) else "pytorch"
    )
    task = {
        "encoder": "image-feature-extraction",
        "classifier": "image-classification",
        "segmenter": "image-segmentation",
    }
    content = {
        **(licence if any(bound) else {"license": "unknown"}),
        "library_name": library,
        "pipeline_tag": task[source.kind],
        "tags": ["mammography", "medical", "research-only", "miram"],
        "datasets": list(dict.fromkeys(x["dataset"] for x in source.licences if x["dataset"] != "unknown")),
    }
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


# ---------------------------------------------------------------------------------------------- what both files say


def public(tree: Any) -> Any:
    """Provenance without what names a place: paths, where a start or a teacher lay, what its file was called."""
    if isinstance(tree, Mapping):
        kept = {key: value for key, value in tree.items() if not (is_path(key) or is_path(value))}
        return {key: public(value) for key, value in kept.items() if key not in ("from", "file") or known(value)}
    return [public(item) for item in tree if not is_path(item)] if isinstance(tree, list | tuple) else tree


def is_path(text: Any) -> bool:
    """Whether it may name a place on somebody's machine."""
    return isinstance(text, str) and re.search(r"[/\\]|^~", text) is not None


def known(name: Any) -> bool:
    """Whether it is a name that all the world uses."""
    return str(name).partition(":")[0] in ("timm", "random")


def content_of(
    folder: Path, source: Source, form: str, written: Written, parity: Parity | None, accuracy: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What export.json says, but for the schema and the digest of README.md."""
    same = ("image_size", "channels", "mean", "std", "classes", "outputs", "kind_of_task", "task", "temperature")
    return {
        "miram": __version__,
        "format": form,
        "kind": source.kind,
        "files": {name: sha256(folder / name) for name in sorted(written.files)},
        "release": release_of(source),
        "intended_use": intended_use(source),
        "limits": list(LIMITS),
        "source": {"digest": source.digest, "method": source.method, "provenance": public(source.provenance)},
        "data": [{**licence, "terms": terms_of(licence)} for licence in source.licences],
        "trained_on": source.trained_on,
        "judged": source.judged,
        **{name: getattr(source, name) for name in same},
        "thresholds": source.thresholds,
        "reading": source.reading,
        "parity": None if parity is None else asdict(parity),
        "accuracy": None if accuracy is None else dict(accuracy),
        "notes": [*source.notes, *written.notes],
        **written.facts,
    }


def intended_use(source: Source) -> str:
    """What it is for, and what not."""
    named = source.classes[source.kind == "segmenter" :]  # what is outlined is no background
    said = PURPOSE[source.kind].format(task=source.task, classes=", ".join(named))
    return f"{said} {NO_DEVICE}"


def write_card(
    folder: Path,
    source: Source,
    form: str,
    written: Written,
    parity: Parity | None,
    accuracy: Mapping[str, Any] | None = None,
    said: Sequence[str] = (),
) -> dict[str, Any]:
    """Write README.md and export.json beside the files.

    Args:
        folder: where they are.
        source: what was exported.
        form: timm, hf, onnx or int8.
        written: what the exporter says of it.
        parity: what was measured; None: nothing could be run.
        accuracy: what the change does to the task, for export.json; None: it was not measured.
        said: the same in sentences.

    Returns:
        What export.json says.
    """
    content = content_of(folder, source, form, written, parity, accuracy)
    write_atomic(folder / README, readme(source, form, content, written, said))
    content["files"][README] = sha256(folder / README)
    write_json(folder / CARD, EXPORT, content)
    return content


# ---------------------------------------------------------------------------------------------- in words


def readme(source: Source, form: str, content: Mapping[str, Any], written: Written, said: Sequence[str]) -> str:
    """README.md."""
    title = {"encoder": "Image encoder", "classifier": f"Classifier: {source.task}", "segmenter": "Segmentation model"}
    usage = ["```python", written.usage.strip(), "```"] if written.usage else []
    sections = {
        "Release": [content["release"]],
        "Intended use": [content["intended_use"]],
        "Use": usage,
        "Input": input_lines(source),
        "Output": output_lines(source),
        "Data": data_lines(source),
        "How good it is": judged_lines(source),
        "Does it compute the same": [*parity_lines(content["parity"]), *(f"- {one}" for one in said)],
        "Notes": [f"- {note}" for note in content["notes"]],
        "Limits": [f"- {limit}" for limit in content["limits"]],
    }
    filled = {name: [*lines] for name, lines in sections.items()}
    body = (["", f"## {name}", "", *lines] for name, lines in filled.items() if lines)
    head = ["---", front_matter(source, form, written.files).strip(), "---", "", f"# {title[source.kind]} ({form})"]
    ban = ["", f"**{content['release']}**"] if any(map(forbids, source.licences)) else []
    made = ["", f"Written by miram {__version__} from weights {source.digest[:16]}; export.json has every figure."]
    return "\n".join([*head, *ban, *made, *(line for lines in body for line in lines)]) + "\n"


def input_lines(source: Source) -> Iterator[str]:
    """What the network takes."""
    height, width = source.image_size
    mean, std = (", ".join(f"{x:.6g}" for x in values) for values in (source.mean, source.std))
    yield f"- float32 of shape (batch, {source.channels}, {height}, {width}), height before width."
    yield "- Pixels as fractions of the largest value that their format allows, 4095 of 12 bits; air is 0, so invert"
    yield "  films whose air is white (MONOCHROME1). Then (pixel - mean) / std, channel by channel:"
    yield f"  mean {mean}, std {std}."
    yield "- `miram data ingest`, unless told otherwise, cuts a film to the breast, mirrors it if the chest wall is not"
    yield "  at the left, and makes all that is no breast 0."
    if source.kind == "encoder":
        yield "- `miram probe` scales a film until it covers this frame, cuts it into even windows and averages their"
        yield "  features."
    reading = {name: value for name, value in source.reading.items() if name != "preprocessing"}
    if said := spelled(reading):
        yield f"- As in training: {said}."
    for how in filter(None, source.reading.get("preprocessing", [])):
        yield f"- Films of its training became images by `miram data ingest` with {spelled(how)}."


def spelled(settings: Mapping[str, Any]) -> str:
    """Settings in one line."""
    words = {True: "yes", False: "no"}
    known = {name: value for name, value in settings.items() if value is not None and value not in ((), [])}
    return ", ".join(f"{k} {words[v] if isinstance(v, bool) else v}" for k, v in known.items())


def output_lines(source: Source) -> Iterator[str]:
    """What the network gives."""
    if source.kind == "encoder":
        yield from feature_lines(source)
    elif source.kind == "segmenter":
        yield f"Logits (batch, {len(source.classes)}, height, width) of {', '.join(source.classes)}: softmax over"
        yield "the classes gives probabilities of pixels."
    else:
        yield f"Logits (batch, {len(source.outputs)}): {', '.join(source.outputs)}. Probabilities are"
        yield f"{PROBABILITIES.get(source.kind_of_task, 'softmax(logits)')}, temperature {source.temperature:.6g}."
    yield from threshold_lines(source)


def feature_lines(source: Source) -> Iterator[str]:
    """What an encoder's numbers are."""
    if source.vit is None:
        yield "Features, before any classifier."
        return
    vit, width = source.vit, source.vit.num_features
    prefix, patches = vit.num_prefix_tokens, vit.patch_embed.num_patches
    if not vit.global_pool:
        yield f"Features (batch, {prefix + patches}, {width}): every token behind the last norm, {prefix} before those"
        yield f"of the {patches} patches; nothing is pooled."
        return
    yield f"Features (batch, {width}): {pooled(vit)} behind the last norm. Masked autoencoders are often"
    yield "best read by the mean of their patch tokens, which the formats that give all tokens allow."


def pooled(vit: Encoder) -> str:
    """What timm makes of the tokens."""
    tokens = "all tokens" if getattr(vit, "pool_include_prefix", False) else "the patch tokens"
    return {
        "token": "the class token",
        "avg": f"the mean of {tokens}",
        "max": f"the largest value of each channel over {tokens}",
        "avgmax": f"half the sum of the mean and the largest value of each channel over {tokens}",
    }.get(vit.global_pool, f"timm's pooling `{vit.global_pool}`")


def threshold_lines(source: Source) -> Iterator[str]:
    """From which probability on the model says yes, and to what."""
    for level, thresholds in source.thresholds.items():
        names = (source.outputs if source.kind == "classifier" else source.classes)[-len(thresholds) :]
        for name, threshold in zip(names, thresholds, strict=False):
            yield f"- `{name}` from probability {threshold:.6g} on, of one {level}."


def data_lines(source: Source) -> Iterator[str]:
    """A table of data sets and licences."""
    yield "| data set | used for | licence | what that means for weights |"
    yield "|---|---|---|---|"
    none = not source.licences and never_trained(source.provenance)
    nothing = {"dataset": "none", "used_for": "nothing", "licence": "none"} if none else unknown("training")
    for x in source.licences or [nothing]:
        terms = "never trained" if none else terms_of(x)
        yield f"| {cell(x['dataset'])} | {cell(x['used_for'])} | {cell(x['licence'])} | {cell(terms)} |"
    if source.trained_on:
        yield ""
        yield f"Tuned on {source.trained_on['images']} images of {source.trained_on['patients']} patients."


def judged_lines(source: Source) -> Iterator[str]:
    """What the run's own test found, before anything was exported."""
    if not (of := source.judged):
        return
    low, high = of.get("interval") or (None, None)
    sure = f" [{low:.3f}, {high:.3f}]" if low is not None and high is not None else ""
    level = f" by {of['level']}" if of.get("level") else ""
    patients = f"{of['n_images']} images of {of['n_patients']} patients"
    yield f"{of['metric']} {of['value']:.3f}{sure}{level} on {patients} ({of['split']}), as `miram {of['stage']}`"
    yield "judged it: nobody was judged by a model that learnt from her."


def cell(text: str) -> str:
    """Text that no table takes for its own."""
    return " ".join(text.replace("|", "/").split())


def parity_lines(parity: Mapping[str, Any] | None) -> Iterator[str]:
    """What was compared, and how far it was off."""
    if parity is None:
        yield "- It was not run here."
        return
    meant = "another output is meant" if parity["tolerance"] is None else f"rounding may do {parity['tolerance']:.3g}"
    yield f"- Largest difference of an output from the run's own: {parity['largest_difference']:.3g}; {meant}. Outputs"
    inputs = "; ".join(f"{name} ({count})" for name, count in parity["inputs"].items())
    yield f"  reach {parity['largest_output']:.3g}. Compared on {inputs}."
