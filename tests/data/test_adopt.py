"""Foreign tars: what other readers see in them is found without copying, and what would mislead is refused."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
import tarfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from http_server import serve
from PIL import Image

from miram.data.foreign.adopt import Survey, adopt, expand, survey, unique
from miram.data.foreign.heads import Head, image_head
from miram.data.foreign.walk import Window, members
from miram.data.image import MAX_PIXELS, UnreadableImage, encode_png
from miram.data.keys import hashed
from miram.data.packed import encode_npy
from miram.data.shards import ShardDataset
from miram.data.store.local import LocalStore
from miram.engine.errors import UserError

SECRET = b"0123456789abcdef"
Members = Sequence[tuple[str, bytes]]


def tar(path: Path, content: Members, form: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as file:
        for name, data in content:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
    return path


def png(seed: int = 0, shape: tuple[int, ...] = (9, 7), kind: type = np.uint8) -> bytes:
    return encode_png(np.random.default_rng(seed).integers(0, np.iinfo(kind).max, shape, dtype=kind))


def saved(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def js(**fields: object) -> bytes:
    return json.dumps(fields).encode()


def look(source: object, **options: Any) -> Survey:
    return survey(str(source), secret=SECRET, **options)


def index(source: object, out: Path, **options: Any) -> Path:
    given = {"labels": (), "dataset": None, "patient": None} | options
    adopt(str(source), out, secret=SECRET, **given)
    return out


def typical(count: int = 6, start: int = 0) -> list[tuple[str, bytes]]:
    return [
        member
        for i in range(start, start + count)
        for member in ((f"case_{i:03d}.png", png(i, (20 + i, 15))), (f"case_{i:03d}.json", js(i=i, grade=i % 3)))
    ]


# ---------------------------------------------------------------------------------------------- what is found


def test_an_adopted_set_reads_as_webdataset_reads_the_tars(tmp_path: Path) -> None:
    for s in range(3):
        tar(tmp_path / f"part-{s}.tar", typical(4, start=4 * s))
    shards = ShardDataset(index(tmp_path, tmp_path / "out", labels=["grade"]))
    urls = [str(path) for path in sorted(tmp_path.glob("*.tar"))]
    foreign = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [row["key"] for row in shards.rows] == [sample["__key__"] for sample in foreign]
    assert shards.labels("grade") == [str(json.loads(sample["json"])["grade"]) for sample in foreign]
    for i, sample in enumerate(foreign):
        assert shards.member(i, "png") == sample["png"]
        np.testing.assert_array_equal(shards[i].pixels, np.asarray(Image.open(io.BytesIO(sample["png"]))))
        assert shards[i].meta == json.loads(sample["json"])
    listed = shards.manifests[0]["shards"]
    assert [shard["name"] for shard in listed] == urls
    assert [shard["samples"] for shard in listed] == [4, 4, 4]


@pytest.mark.parametrize("source", ["folder", "tar", "pattern"])
def test_a_folder_a_tar_and_a_pattern_are_sources(tmp_path: Path, source: str) -> None:
    for s in range(12):
        tar(tmp_path / f"s-{s:02d}.tar", typical(1, start=s))
    place = {"folder": tmp_path, "tar": tmp_path / "s-03.tar", "pattern": tmp_path / "s-{02..11}.tar"}[source]
    found = look(place)
    assert len(found.table) == {"folder": 12, "tar": 1, "pattern": 10}[source]
    assert all(Path(row["shard"]).is_absolute() for row in found.table)


def test_statistics_are_those_of_the_pixels(tmp_path: Path) -> None:
    arrays = [np.random.default_rng(i).integers(0, 4096, (20, 10 + i), dtype=np.uint16) for i in range(5)]
    content = [
        (f"{i}.{kind}", data)
        for i, a in enumerate(arrays)
        for kind, data in (("npy", encode_npy(a)), ("json", js(bits=12)))
    ]
    found = look(tar(tmp_path / "a.tar", content))
    x = np.concatenate([array.ravel() / 4095 for array in arrays])
    assert found.facts["pixels"] == pytest.approx({"n": x.size, "mean": x.mean(), "std": x.std()})
    assert [(row["height"], row["width"], row["bits"], row["max_value"]) for row in found.table] == [
        (20, 10 + i, 12, 4095) for i in range(5)
    ]


def test_values_above_what_the_json_tells_are_noticed(tmp_path: Path) -> None:
    found = look(tar(tmp_path / "a.tar", [("a.png", png(kind=np.uint16)), ("a.json", js(bits=10))]))
    assert any("more than the `bits`" in note for note in found.notes)


def test_a_url_is_indexed_by_its_headers(tmp_path: Path) -> None:
    for s in range(2):
        large = [
            (f"{s}{i}.{kind}", data)
            for i in range(40)
            for kind, data in (("png", png(i, (300, 300))), ("json", js(i=i)))
        ]
        tar(tmp_path / f"s-{s}.tar", large)
    here = look(tmp_path / "s-{0..1}.tar", labels=["i"], dataset="x")
    with serve(tmp_path) as site:
        there = look(f"{site.url}/s-{{0..1}}.tar", labels=["i"], dataset="x")
        total = sum((tmp_path / f"s-{s}.tar").stat().st_size for s in range(2))
        decoded = sum(row["png_size"] for row in here.table[::3])
        assert site.traffic.sent.total() < decoded + 80 * 17_000 < total
        read = ShardDataset(index(f"{site.url}/s-0.tar", tmp_path / "out"))
        assert read.member(3, "png") == png(3, (300, 300))
    assert [row | {"shard": ""} for row in there.table] == [row | {"shard": ""} for row in here.table]
    assert there.table[0]["shard"] == f"{site.url}/s-0.tar"
    assert [shard["sha256"] for shard in there.facts["shards"]] == [None, None]
    assert [shard["bytes"] for shard in there.facts["shards"]] == [shard["bytes"] for shard in here.facts["shards"]]


def test_all_the_kinds_of_images_are_found(tmp_path: Path) -> None:
    gray = Image.fromarray(np.arange(63, dtype=np.uint8).reshape(9, 7))
    content = [
        ("a.PNG", png()),
        ("b.jpg", saved(gray, "jpeg")),
        ("c.JPEG", saved(gray, "jpeg")),
        ("d.npy", encode_npy(np.ones((9, 7), np.uint16))),
    ]
    path = tar(tmp_path / "a.tar", content)
    found = look(path)
    kinds = ["png", "jpg", "jpg", "npy"]
    for row, kind, (_, data) in zip(found.table, kinds, content, strict=True):
        start = row[f"{kind}_offset"]
        assert path.read_bytes()[start : start + row[f"{kind}_size"]] == data
        assert (row["height"], row["width"]) == (9, 7)
    assert len(ShardDataset(index(path, tmp_path / "out"))[1].pixels) == 9


def test_masks_that_fit_their_image_are_kept(tmp_path: Path) -> None:
    content = [("a.png", png()), ("a.mask.png", png(1)), ("b.png", png()), ("b.mask.png", png(1, (8, 7)))]
    content += [("c.png", png()), ("c.mask.png", png(1, kind=np.uint16)), ("d.png", png()), ("d.mask.png", b"no")]
    found = look(tar(tmp_path / "a.tar", content))
    assert ["mask.png_size" in row for row in found.table] == [True, False, False, False]
    assert any(note.startswith("3 samples: the mask is left out") for note in found.notes)


# ---------------------------------------------------------------------------------------------- keys


def test_keys_are_made_ours_and_unique(tmp_path: Path) -> None:
    names = ["./X/Bild 1.png", "x/bild_1.PNG", "x/Bild-1.png", "Größe.png", "ok_1-2.png"]
    found = look(tar(tmp_path / "a.tar", [(name, png()) for name in names]))
    assert [row["key"] for row in found.table] == ["x-bild-1", "x-bild_1", "x-bild-1-2", "gr--e", "ok_1-2"]


def test_keys_of_several_shards_are_told_apart(tmp_path: Path) -> None:
    for s in range(2):
        tar(tmp_path / f"Part {s}.tar", typical(3))
    found = look(tmp_path)
    assert [row["key"] for row in found.table] == [f"part-{s}-case_{i:03d}" for s in range(2) for i in range(3)]


def test_numbers_that_make_keys_unique_collide_with_none() -> None:
    rng = random.Random(0)
    for _ in range(300):
        keys = [rng.choice(["a", "a-2", "a-3", "a-2-2", "b"]) for _ in range(rng.randrange(9))]
        made = unique(keys)
        assert len(set(made)) == len(made)
        assert [new for new, old in zip(made, keys, strict=True) if new == old] == list(dict.fromkeys(keys))


def test_many_equal_keys_are_numbered_quickly() -> None:
    started = time.monotonic()
    assert len(set(unique(["a"] * 50_000))) == 50_000
    assert time.monotonic() - started < 2


# ---------------------------------------------------------------------------------------------- what is left out


def test_what_runs_code_elsewhere_is_ignored_and_counted(tmp_path: Path) -> None:
    bomb = b"cos\nsystem\n(S'touch pwned'\ntR."
    content = [(f"a.{kind}", bomb) for kind in ("pkl", "pyd", "pth", "pkl.gz")] + [
        ("a.png", png()),
        ("a.txt", b"hello"),
    ]
    content += [("readme", b"x"), (".hidden.png", png()), ("__index__.json", b"{}")]
    found = look(tar(tmp_path / "a.tar", content))
    assert {name for name in found.table[0] if name.endswith("_size")} == {"png_size"}
    (note,) = (note for note in found.notes if note.startswith("ignored"))
    assert all(f"{kind} 1" in note for kind in ("pkl", "pyd", "pth", "gz", "txt"))
    assert "ignored 8 members" in note


def test_samples_without_a_usable_image_are_left_out_with_the_reason(tmp_path: Path) -> None:
    huge = bytearray(png())
    huge[16:24] = (20_000).to_bytes(4, "big") * 2
    content = [("a.png", png()), ("b.json", js(x=1)), ("c.png", b"oops"), ("d.png", bytes(huge)), ("e.png", b"")]
    content += [("f.npy", encode_npy(np.ones((3, 3), np.uint8))[:-1]), ("g.jpg", b"\xff\xd8\xff")]
    found = look(tar(tmp_path / "a.tar", content))
    assert [row["key"] for row in found.table] == ["a"]
    reasons = [reason for _, reason in sorted(found.skipped.items())]
    assert len(reasons) == 6
    assert f"more than {MAX_PIXELS} pixels" in reasons[2]
    out = index(tmp_path / "a.tar", tmp_path / "out")
    listed = list(csv.reader((tmp_path / "out.skipped.csv").open()))
    assert len(listed) == 7
    assert json.loads((out / "manifest.json").read_text())["skipped"] == 6


def test_a_jpeg_whose_segments_lead_out_of_the_tar_is_left_out(tmp_path: Path) -> None:
    found = look(tar(tmp_path / "a.tar", [("a.png", png()), ("b.jpg", b"\xff\xd8" + b"\xff\xe1\xff\xff" * 9)]))
    assert list(found.skipped.values()) == ["it is a JPEG with a damaged header"]


def test_json_that_is_none_is_left_out_and_counted(tmp_path: Path) -> None:
    bad = [b"{", b"[1]", b"[" * 100_000, b'"' + b"x" * 2**20 + b'"', b"\xff\xfe", b'{"a": ' + b"9" * 5000 + b"}"]
    content = [m for i, data in enumerate(bad) for m in ((f"{i}.png", png()), (f"{i}.json", data))]
    found = look(tar(tmp_path / "a.tar", [*content, ("z.png", png()), ("z.json", js(a=1))]))
    assert ["json_size" in row for row in found.table] == [*[False] * len(bad), True]
    assert any(note.startswith(f"{len(bad)} samples: no usable JSON") for note in found.notes)


# ---------------------------------------------------------------------------------------------- JSON


def test_the_index_takes_what_is_in_its_form(tmp_path: Path) -> None:
    good = {"laterality": "left", "view": "MLO", "split": "train", "spacing_mm": 0.07, "max_value": 1000, "name": "Ann"}
    bad = {"laterality": "up", "view": "of Ann", "split": ["x"], "spacing_mm": float("nan"), "max_value": 70_000}
    content = [("a.png", png(kind=np.uint16)), ("a.json", js(**good)), ("b.png", png()), ("b.json", js(**bad))]
    one, two = look(tar(tmp_path / "a.tar", content)).table
    taken = ("laterality", "view", "split", "spacing_mm", "max_value", "bits")
    assert [one[name] for name in taken] == ["L", "MLO", "train", 0.07, 1000, 10]
    assert [two[name] for name in taken] == ["", "", "", "", 255, 8]
    assert "Ann" not in str(one) + str(two)


def test_labels_are_the_fields_asked_for_and_cls(tmp_path: Path) -> None:
    values = [0, 1.5, True, "BI-RADS 4", None, "x" * 65, ["a"], float("inf"), "two\nlines", "\ud800"]
    content = [
        m for i, v in enumerate(values) for m in ((f"{i}.png", png()), (f"{i}.json", js(v=v)), (f"{i}.cls", b"7\n"))
    ]
    path = tar(tmp_path / "a.tar", content)
    found = look(path, labels=["v"])
    assert [row["label_v"] for row in found.table] == ["0", "1.5", "1", "BI-RADS 4", *[""] * 6]
    assert {row["label_cls"] for row in found.table} == {"7"}
    assert any(note.startswith("5 samples: 'v' is no short text") for note in found.notes)
    assert "label_v" not in look(path).columns
    assert ShardDataset(index(path, tmp_path / "out", labels=["v"])).labels("v")[3] == "BI-RADS 4"


def test_patients_are_hashed_as_ingest_does(tmp_path: Path) -> None:
    content = [m for i, p in enumerate(["P 1", 17, "", None]) for m in ((f"{i}.png", png()), (f"{i}.json", js(pid=p)))]
    out = index(tar(tmp_path / "a.tar", content), tmp_path / "out", patient="pid", dataset="mine")
    text = (out / "index.csv").read_text()
    rows = list(csv.DictReader(text.splitlines()))
    assert [row["patient"] for row in rows[:2]] == [hashed(SECRET, "mine", "patient", p) for p in ("P 1", "17")]
    assert len({row["patient"] for row in rows}) == 4, "who is not told counts as a patient of its own"
    assert "P 1" not in text


def test_a_field_that_is_nowhere_is_refused(tmp_path: Path) -> None:
    path = tar(tmp_path / "a.tar", typical())
    with pytest.raises(UserError, match="'grad'; did you mean 'grade'"):
        look(path, labels=["grad"])
    with pytest.raises(UserError, match="'who'"):
        look(path, patient="who")
    with pytest.raises(UserError, match="no JSON"):
        look(tar(tmp_path / "b.tar", [("a.png", png())]), labels=["grade"])


# ---------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["1.2.840.1.png", "1.2.840.2.png"], "dots in its names"),
        (["a_1.LEFT_CC.png", "a_1.LEFT_MLO.png", "a_2.LEFT_CC.png"], "dots in its names"),
        (["1.2.1.png", "1.2.1.json", "2.3.png", "1.2.3.png"], "dots in its names"),
        (["a.png", "b.png", "a.json", "b.json"], "'a' together"),
        (["a.png", "a.json", "b.png", "a.png"], "'a' together"),
        (["a.png", "a.PNG"], "twice"),
        (["a.jpg", "a.jpeg"], "twice"),
        (["a.txt", "b.txt"], "png, jpg or npy"),
        ([], "png, jpg or npy"),
    ],
)
def test_names_that_do_not_make_samples_are_refused(tmp_path: Path, names: list[str], message: str) -> None:
    path = tar(tmp_path / "shard.tar", [(name, png() if name[-1] in "gG" else js(a=1)) for name in names])
    with pytest.raises(UserError, match=message) as caught:
        look(path)
    assert "shard.tar" in str(caught.value)


def test_other_images_beside_the_one_are_no_dotted_names(tmp_path: Path) -> None:
    found = look(tar(tmp_path / "a.tar", [("a.png", png()), ("a.seg.png", png()), ("b.png", png())]))
    assert len(found.table) == 2


def header_places(path: Path) -> list[int]:
    with tarfile.open(path) as file:
        return [member.offset for member in file]


def damaged(path: Path, how: str) -> bytes:
    raw, places = bytearray(path.read_bytes()), header_places(path)
    middle = places[len(places) // 2]
    if how == "zeroed header":
        raw[middle : middle + 512] = bytes(512)
    if how == "flipped bit":
        raw[middle + 130] ^= 1
    if how == "wild size":
        raw[middle : middle + 512] = tarfile.TarInfo.frombuf(
            bytes(raw[middle : middle + 512]), "utf-8", "strict"
        ).tobuf()
        info = tarfile.TarInfo("a.png")
        info.size = 10**11
        raw[middle : middle + 512] = info.tobuf(tarfile.GNU_FORMAT)
    cuts = {"cut at a member": middle, "cut in a header": middle + 100, "cut in a payload": middle + 600}
    if how in cuts:
        return bytes(raw[: cuts[how]])
    return {"two tars": bytes(raw) * 2, "compressed": gzip.compress(raw), "web page": b"<html>" * 900}.get(
        how, bytes(raw)
    )


@pytest.mark.parametrize(
    "how",
    [
        "zeroed header",
        "flipped bit",
        "wild size",
        "cut at a member",
        "cut in a header",
        "cut in a payload",
        "two tars",
        "compressed",
        "web page",
    ],
)
def test_a_tar_that_readers_would_end_early_is_refused(tmp_path: Path, how: str) -> None:
    whole = tar(tmp_path / "whole.tar", typical(10))
    (tmp_path / "x").mkdir()
    broken = tmp_path / "x" / "broken.tar"
    broken.write_bytes(damaged(whole, how))
    with pytest.raises(UserError, match=r"broken\.tar") as caught:
        look(broken)
    middle = header_places(whole)[10]
    if how in ("zeroed header", "flipped bit", "cut at a member", "cut in a header"):
        assert f"at byte {middle};" in str(caught.value)


def test_a_shard_that_is_missing_in_a_pattern_is_named(tmp_path: Path) -> None:
    tar(tmp_path / "s-0.tar", typical(1))
    with pytest.raises(UserError, match=r"s-1\.tar"):
        look(tmp_path / "s-{0..2}.tar")
    with serve(tmp_path) as site, pytest.raises(UserError, match=r"s-1\.tar"):
        look(f"{site.url}/s-{{0..2}}.tar")


@pytest.mark.parametrize(
    "source",
    [
        "pipe:cat x.tar",
        "http://ann:secret@h/a.tar",
        "https://h/a.tar?signature=secret",
        "https://h/folder/",
        "https://h",
        "ftp://h/a.tar",
    ],
)
def test_sources_that_are_none_are_refused(source: str) -> None:
    with pytest.raises(UserError) as caught:
        look(source)
    assert "secret" not in str(caught.value)


def test_an_empty_folder_and_a_missing_one_are_refused(tmp_path: Path) -> None:
    for source in (tmp_path, tmp_path / "none", tmp_path / "none.tar"):
        with pytest.raises(UserError, match=str(source)):
            look(source)


def test_a_folder_with_something_in_it_is_not_written_to(tmp_path: Path) -> None:
    tar(tmp_path / "a.tar", typical(1))
    with pytest.raises(UserError, match="not empty"):
        index(tmp_path, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]


def test_patterns_expand_as_in_a_shell() -> None:
    assert expand("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert expand("a-{9..10}-{x,y}.tar") == ["a-9-x.tar", "a-9-y.tar", "a-10-x.tar", "a-10-y.tar"]
    assert expand("plain{}.tar") == ["plain{}.tar"]
    for wild in ("{0..999999999999}", "{0..9999}{0..9999}", "{a,b}" * 60):
        with pytest.raises(UserError, match="100000"):
            expand(wild)


# ---------------------------------------------------------------------------------------------- as others see it


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_of_tarfile(tmp_path: Path, form: int) -> None:
    path, rng = tmp_path / "a.tar", random.Random(form)
    deep = "" if form == tarfile.USTAR_FORMAT else "d" * 90 + "/" + "é" * 120 + "/"
    with tarfile.open(
        path, "w", format=form, pax_headers={"comment": "x"} if form == tarfile.PAX_FORMAT else None
    ) as file:
        for i in range(30):
            member = tarfile.TarInfo(f"{deep if i % 3 else ''}{i}.png")
            member.size = rng.choice([0, 1, 511, 512, 513, 40_000])
            member.mtime = 0.5 if form == tarfile.PAX_FORMAT else 0
            file.addfile(member, io.BytesIO(bytes(member.size)))
            link = tarfile.TarInfo(f"link{i}")
            link.type, link.linkname = rng.choice([tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE]), deep + "target"
            file.addfile(link)
    found = [(m.name, m.offset, m.size) for m in members(Window(LocalStore(), str(path))) if m.plain]
    with tarfile.open(path) as file:
        assert found == [(m.name, m.offset_data, m.size) for m in file if m.isreg()]


def test_a_sparse_file_is_refused(tmp_path: Path) -> None:
    info = tarfile.TarInfo("a.png")
    info.type = tarfile.GNUTYPE_SPARSE
    (tmp_path / "a.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with pytest.raises(UserError, match="sparse"):
        look(tmp_path)


def pictures() -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    gray = Image.fromarray(rng.integers(0, 255, (33, 21), dtype=np.uint8))
    rgb = Image.fromarray(rng.integers(0, 255, (33, 21, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x010E] = "x" * 60_000
    made = {
        "png gray": saved(gray, "png"),
        "png 1": saved(gray.convert("1"), "png"),
        "png P": saved(gray.convert("P"), "png"),
        "png LA": saved(gray.convert("LA"), "png"),
        "png RGB": saved(rgb, "png"),
        "png RGBA": saved(rgb.convert("RGBA"), "png"),
        "png 16": png(shape=(33, 21), kind=np.uint16),
        "jpg gray": saved(gray, "jpeg"),
        "jpg RGB": saved(rgb, "jpeg", progressive=True),
        "jpg far": saved(gray, "jpeg", exif=exif, icc_profile=bytes(200_000), comment=b"c" * 60_000),
        "npy 8": encode_npy(np.asarray(gray)),
        "npy 16": encode_npy(np.asarray(gray).astype(np.uint16)),
        "npy RGB": encode_npy(np.asarray(rgb)),
    }
    return made


def read_of(content: bytes) -> Any:
    return lambda offset, size: content[offset : offset + size]


@pytest.mark.parametrize("name", list(pictures()))
def test_the_head_is_what_decoding_gives(name: str) -> None:
    content = pictures()[name]
    head = image_head(name[:3], read_of(content), len(content))
    if name.startswith("npy"):
        array = np.load(io.BytesIO(content))
    else:
        image = Image.open(io.BytesIO(content))
        assert (image.height, image.width) == (head.height, head.width)
        array = np.asarray(image.convert({"P": "RGB", "LA": "L", "RGBA": "RGB", "1": "L"}.get(image.mode, image.mode)))
    channels = array.shape[2] if array.ndim == 3 else 1
    assert head == Head(33, 21, channels, np.iinfo(array.dtype).max)


def test_images_that_would_be_read_with_loss_are_refused() -> None:
    cmyk = saved(Image.new("CMYK", (5, 5)), "jpeg")
    colour16 = bytearray(png(kind=np.uint16))
    colour16[25] = 2
    signed = io.BytesIO()
    np.save(signed, np.ones((3, 3), np.int16))
    for kind, content in (("jpg", cmyk), ("png", bytes(colour16)), ("npy", signed.getvalue())):
        with pytest.raises(UnreadableImage):
            image_head(kind, read_of(content), len(content))


# ---------------------------------------------------------------------------------------------- fuzz


def mutated(rng: random.Random, raw: bytes, places: Sequence[int]) -> bytes:
    """A wound or a few, most of them where they hurt: in headers, with the checksum made good more often than not."""
    content = bytearray(raw)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        kind, start = rng.randrange(12), rng.choice(places)
        if kind < 3:
            content[rng.randrange(len(content))] = rng.randrange(256)
        elif kind == 3:
            del content[max(1, rng.randrange(len(content))) :]
        elif kind == 4:
            at = rng.randrange(len(content))
            content[at:at] = rng.randbytes(rng.choice([1, 512, 1000]))
        elif start + 600 <= len(content):
            at, size = rng.choice([(0, 3), (0, 100), (124, 12), (156, 1), (345, 155), (512, 4), (512, 26), (530, 64)])
            wild = [
                rng.randbytes(size),
                b"7" * size,
                b"x",
                b"g",
                b"L",
                b"S",
                b"\x80" + b"\xff" * (size - 1),
                bytes(size),
            ]
            value = rng.choice(wild)[:size]
            content[start + at : start + at + len(value)] = value
            if rng.random() < 0.7:
                content[start + 148 : start + 156] = b" " * 8
                content[start + 148 : start + 156] = b"%06o\0 " % sum(content[start : start + 512])
    return bytes(content)


def peak(function: Callable[[], object]) -> int:
    """Most bytes that Python held while it ran."""
    tracemalloc.start()
    try:
        function()
    finally:
        held = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return held


def test_mutated_tars_are_adopted_or_refused(tmp_path: Path) -> None:
    some = pictures()
    base = [*typical(2), ("a.png", png()), ("a.cls", b"1"), ("j.jpg", some["jpg far"][:70_000])]
    base += [("n.npy", some["npy 16"]), ("n.json", js(grade=1, i=2)), ("n.mask.png", png(1, (33, 21)))]
    outcomes, path, started = Counter[bool](), tmp_path / "a.tar", time.monotonic()
    for seed in range(500):
        rng, form = random.Random(seed), (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)[seed % 3]
        tar(path, [*base, ("long" * (40 if seed % 3 else 1) + ".png", png(2))], form)
        path.write_bytes(mutated(rng, path.read_bytes(), header_places(path)))

        def adopted(seed: int = seed) -> None:
            try:
                outcomes[bool(look(path, labels=["grade"], patient="i").table)] += 1
            except UserError as error:
                outcomes[False] += str(error).isprintable()

        if seed % 10:
            adopted()
        else:
            assert peak(adopted) < 20 * 2**20, seed
    assert outcomes.total() == 500
    assert min(outcomes.values()) > 100
    assert time.monotonic() - started < 60


def test_chains_of_extended_headers_end(tmp_path: Path) -> None:
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, 512
    record = info.tobuf(tarfile.PAX_FORMAT) + b"512 path=" + b"a" * 502 + b"\n"
    (tmp_path / "a.tar").write_bytes(record * 20_000 + bytes(1024))
    started = time.monotonic()
    with pytest.raises(UserError):
        look(tmp_path)
    assert time.monotonic() - started < 5
    info.size = 2**20
    (tmp_path / "a.tar").write_bytes(info.tobuf(tarfile.PAX_FORMAT) + b"5 =a\n" * (2**20 // 5) + b"\n" + bytes(1024))
    with pytest.raises(UserError):
        look(tmp_path)
    assert time.monotonic() - started < 5


def test_an_adopted_set_can_be_packed_and_takes_no_foreign_json_along(tmp_path: Path) -> None:
    """Tars as `tar -C dir .` writes them, with names and marks in a JSON of their own kind."""
    from miram.data.derive import derive
    from miram.data.geometry import Size
    from miram.data.shards import ShardDataset
    from miram.data.verify import verify

    meta = json.dumps({"name": "Doe, Jane", "boxes": [[1, 2, 3]], "circles": "round"}).encode()
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i in range(6):
            pixels = np.full((12, 10), 40 * i, np.uint8)
            for kind, body in (("png", encode_png(pixels)), ("json", meta)):
                info = tarfile.TarInfo(f"./v1.0/c{i}.{kind}")
                info.size = len(body)
                tar.addfile(info, io.BytesIO(body))
    for _ in range(2):  # the second time it is there already
        adopt(str(tmp_path / "a.tar"), tmp_path / "set", labels=(), dataset="x", patient=None, secret=SECRET)
    assert not list(verify(tmp_path / "set"))
    derive(tmp_path / "set", tmp_path / "packed", Size(), packed=True, workers=1)
    first, packed = ShardDataset(tmp_path / "set"), ShardDataset(tmp_path / "packed")
    assert len(packed) == 6
    for i in range(6):
        np.testing.assert_array_equal(first[i].pixels, packed[i].pixels[:])
        assert "Doe" not in json.dumps(packed[i].meta)
    assert all(b"Doe" not in path.read_bytes() for path in (tmp_path / "packed").iterdir())


def test_a_label_that_may_name_a_patient_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="case_id"):
        adopt(str(tmp_path), tmp_path / "set", labels=("case_id",), dataset="x", patient=None, secret=SECRET)
