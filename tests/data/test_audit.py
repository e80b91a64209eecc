"""The audit finds what was hidden on purpose, says where without quoting it, and is silent about what miram writes."""

from __future__ import annotations

import base64
import io
import json
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from subprocess import CompletedProcess

import numpy as np
import pytest
from archives import cbis_archive, cmmd_archive
from dicoms import CANARIES, mammogram, plant, save, write_dicom
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from pydicom import Dataset, dcmread
from safetensors.numpy import save_file

from miram.data.archive import Archive
from miram.data.audit.look import Searched, audit
from miram.data.audit.search import Values, Windows, archive_values, text_values
from miram.data.image import encode_png
from miram.data.ingest import ingest
from miram.data.packed import encode_npy
from miram.engine.errors import UserError

Member = tuple[tarfile.TarInfo, bytes]
Change = Callable[[tarfile.TarInfo, bytes], Member]
SECRET = "Canary^Jane 19480211"


def found(folder: Path, source: Path | None = None, *allow: str) -> list[str]:
    return [str(finding) for finding in audit(folder, source, allow)]


def rewrite(folder: Path, change: Change, kind: str = "json", form: int = tarfile.USTAR_FORMAT) -> None:
    """Change the first member of a kind in the shard."""
    shard = folder / "shard-000000.tar"
    with tarfile.open(shard) as tar:
        members = [(info, tar.extractfile(info).read()) for info in tar]  # type: ignore[union-attr]
    first = next(i for i, (info, _) in enumerate(members) if info.name.partition(".")[2] == kind)
    members[first] = change(*members[first])
    with tarfile.open(shard, "w", format=form) as tar:
        for info, content in members:
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def set_field(**fields: object) -> Change:
    def change(info: tarfile.TarInfo, content: bytes) -> Member:
        for name, value in fields.items():
            setattr(info, name, value)
        return info, content

    return change


def set_content(content: bytes) -> Change:
    return lambda info, _: (info, content)


def png(**options: object) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (9, 7), 50).save(buffer, "png", **options)
    return buffer.getvalue()


def with_text() -> PngInfo:
    info = PngInfo()
    info.add_text("Comment", SECRET)
    return info


def with_chunk(kind: bytes, body: bytes) -> bytes:
    whole = png()
    crc = zlib.crc32(kind + body).to_bytes(4, "big")
    return whole[:33] + len(body).to_bytes(4, "big") + kind + body + crc + whole[33:]


def with_more_in_idat() -> bytes:
    body = zlib.compress(b"\0" * 70 + SECRET.encode())
    head = png()[:33]
    chunks = ((b"IDAT", body), (b"IEND", b""))
    return head + b"".join(len(b).to_bytes(4, "big") + k + b + zlib.crc32(k + b).to_bytes(4, "big") for k, b in chunks)


def add_field(path: tuple[str, ...], value: object) -> Change:
    def change(info: tarfile.TarInfo, content: bytes) -> Member:
        sample = inner = json.loads(content)
        for name in path[:-1]:
            inner = inner[name]
        inner[path[-1]] = value
        return info, json.dumps(sample).encode()

    return change


# ---------------------------------------------------------------------------------------------- what miram writes


def test_a_data_set_is_clean(phantoms: Path) -> None:
    searched = Searched()
    assert list(audit(phantoms, searched=searched)) == []
    assert (searched.files, searched.values) == (len(list(phantoms.iterdir())), 0)
    assert searched.bytes > (phantoms / "index.csv").stat().st_size


def test_a_packed_set_is_clean(phantoms: Path, tmp_path: Path, miram: Callable[..., CompletedProcess[str]]) -> None:
    done = miram("data", "pack", phantoms, tmp_path / "packed")
    assert done.returncode == 0, done.stderr
    assert found(tmp_path) == []


@pytest.mark.slow
def test_a_run_and_its_report_are_clean(
    tiny: list[str], tmp_path: Path, miram: Callable[..., CompletedProcess[str]]
) -> None:
    run = tmp_path / "run"
    here = [argument for argument in tiny if "data.shards" not in argument]
    phantoms = next(argument for argument in tiny if "data.shards" in argument).partition("=")[2]
    (tmp_path / "set").symlink_to(phantoms)
    done = miram("pretrain", "pretrain/demo", *here, "--data.shards=set", "--out=run", "--train.steps=3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert miram("report", run).returncode == 0
    assert found(run) == []


def test_what_is_no_folder_or_empty_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not there"):
        found(tmp_path / "none")
    with pytest.raises(UserError, match="holds no file"):
        found(tmp_path)


# ---------------------------------------------------------------------------------------------- form

SHARDS: dict[str, tuple[str, Change, str]] = {
    "user by number": ("json", set_field(uid=1000), "header of member .*by number"),
    "group by number": ("json", set_field(gid=1000), "header of member .*by number"),
    "user by name": ("png", set_field(uname="jdoe"), "header of member .*user or group"),
    "group by name": ("png", set_field(gname="radiology"), "header of member .*user or group"),
    "time": ("png", set_field(mtime=1700000000), "header of member .*says when"),
    "link": ("json", set_field(linkname="/home/jane"), "header of member .*more than a name and a size"),
    "mode": ("json", set_field(mode=0o4755), "header of member .*more than a name and a size"),
    "folder": ("json", set_field(type=tarfile.DIRTYPE), "no plain file"),
    "name": ("json", set_field(name="Jane-Doe.json"), "its name is not KEY"),
    "kind": ("json", set_field(name="key.pyd"), "its name is not KEY"),
    "tEXt": ("png", set_content(png(pnginfo=with_text())), r"\(png\).*chunk tEXt"),
    "eXIf": ("png", set_content(with_chunk(b"eXIf", b"MM\0*")), r"\(png\).*chunk eXIf"),
    "pHYs": ("png", set_content(png(dpi=(96, 96))), r"\(png\).*chunk pHYs"),
    "private": ("mask.png", set_content(with_chunk(b"prVt", SECRET.encode())), r"\(mask.png\).*chunk prVt"),
    "behind IEND": ("png", set_content(png() + SECRET.encode()), "bytes behind its end"),
    "in IDAT": ("png", set_content(with_more_in_idat()), "more or fewer bytes"),
    "no PNG": ("png", set_content(b"GIF89a"), "no sound PNG"),
    "cut PNG": ("png", set_content(png()[:50]), "no sound PNG"),
    "field": ("json", add_field(("PatientName",), "x"), r"\(json\).*field that no sample has"),
    "object": ("json", add_field(("view",), {"a": 1}), r"\(json\).*field that no sample has"),
    "field of geometry": ("json", add_field(("geometry", "device"), 1), r"geometry has a field"),
    "field of facts": ("json", add_field(("facts",), {"station": "x"}), r"facts has a field"),
    "text for circles": ("json", add_field(("circles",), ["x"]), "circles has a field"),
    "telling label": (
        "json",
        add_field(("label_patient_name",), "x"),
        r"\(json\).*label patient_name looks identifying",
    ),
    "label of a case": ("json", add_field(("label_case_id",), "x"), r"\(json\).*label case_id looks identifying"),
    "label with a name in it": ("json", add_field(("label_case_of_Canary^Jane",), "x"), "label … looks identifying"),
    "foreign field": ("json", add_field(("Canary",), "x"), "has a field that no sample has"),
    "label of many parts": ("json", add_field(("label_mass",), ["x"]), "has a field that no sample has"),
    "no JSON": ("json", set_content(b"{"), "is no JSON"),
    "no object": ("json", set_content(b"[]"), "is no object"),
    "deep JSON": ("json", set_content(b"[" * 100_000), "is no JSON"),
}


@pytest.mark.parametrize("case", SHARDS)
def test_a_shard_with_more_than_a_sample_needs(case: str, copied: Path) -> None:
    kind, change, expected = SHARDS[case]
    rewrite(copied, change, kind)
    said = found(copied)
    assert any(re.search(f"shard-000000.tar, .*{expected}", line) for line in said), said
    assert not any("Canary" in line for line in said)


def test_extended_tar_headers_are_found_and_searched(copied: Path) -> None:
    rewrite(copied, set_field(pax_headers={"comment": "jane@clinic.org"}), form=tarfile.PAX_FORMAT)
    said = found(copied)
    assert any("no plain file" in line for line in said)
    assert any("e-mail" in line for line in said)


@pytest.mark.parametrize("expected", ["the end", "the padding"])
def test_bytes_where_zeros_belong(copied: Path, expected: str) -> None:
    shard = copied / "shard-000000.tar"
    content = bytearray(shard.read_bytes())
    with tarfile.open(shard) as tar:
        first = next(info for info in tar if info.size % 512)
    place = -1 if expected == "the end" else first.offset_data + first.size
    assert content[place] == 0
    content[place] = 1
    shard.write_bytes(content)
    assert any(f"{expected} is not empty" in line for line in found(copied))


@pytest.mark.parametrize("cut", [100, 700, 5000])
def test_a_shard_that_is_cut_short(copied: Path, cut: int) -> None:
    shard = copied / "shard-000000.tar"
    shard.write_bytes(shard.read_bytes()[:cut])
    assert any("nothing from here on" in line or "the end" in line for line in found(copied))


def test_npy_headers(tmp_path: Path) -> None:
    plain = encode_npy(np.arange(5000, dtype=np.uint16).reshape(50, 100))
    (tmp_path / "good.npy").write_bytes(plain)
    assert found(tmp_path) == []
    (tmp_path / "bad.npy").write_bytes(plain.replace(b"}   ", b"}Doe"))
    (tmp_path / "long.npy").write_bytes(plain + b"Doe")
    np.save(tmp_path / "objects.npy", np.array([{}, 1]), allow_pickle=True)
    assert [line.partition(",")[0] for line in found(tmp_path)] == ["bad.npy", "long.npy", "objects.npy"]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("laterality", "PatientName", "column 15: is no column"),
        ("label_mass", "label_case_id", "label case_id looks identifying"),
        (",L,", ",12.03.1948 in 1948-03-12,", "ISO date"),
        (",4095,", ",x4095,", "text where numbers belong"),
        ("key,", '"key,', "is no CSV"),
    ],
)
def test_an_index_with_more_than_it_needs(copied: Path, old: str, new: str, expected: str) -> None:
    index = copied / "index.csv"
    text = index.read_text()
    assert old in text
    column = text.partition("\n")[0].split(",").index("laterality") + 1
    index.write_text(text.replace(old, new, 1))
    expected = expected.replace("column 15", f"column {column}")
    said = found(copied)
    assert any((line.startswith("index.csv, ") and expected in line) or expected == "is no CSV" for line in said), said


TELLING = {
    "a UID": ("1.2.840.113619.2.5.1762583153.215519", "UID"),
    "an ISO date": ("1948-02-11T10:00", "ISO date"),
    "a DICOM date": ("19480211", "DICOM date"),
    "a home": ("/home/jdoe/films", "home folder"),
    "a Mac's home": ("/Users/jdoe", "home folder"),
    "a Windows home": (r"C:\\Users\\jdoe", "home folder"),
    "a mail address": ("jane.doe@clinic.example.org", "e-mail"),
}
FILES = {
    "state.json": '{"reason": "X"}\n',
    "metrics.jsonl": '{"a": 1}\n{"b": "X"}\n',
    "config.yaml": "out: 'X'\n",
    "notes.txt": "so X it is\n",
    "job.log": "X\n",
    "slurm.out": "step 1\nX\n",
    "split.csv": "key,fold\nX,1\n",
    "report.html": "<p>1</p>\n<p>X</p>\n",
}


@pytest.mark.parametrize("kind", TELLING)
@pytest.mark.parametrize("name", FILES)
def test_text_that_looks_telling(name: str, kind: str, tmp_path: Path) -> None:
    value, what = TELLING[kind]
    (tmp_path / name).write_text(FILES[name].replace("X", value))
    line = FILES[name][: FILES[name].index("X")].count("\n") + 1
    said = found(tmp_path)
    assert any(text.startswith(f"{name}, line {line}: ") and what in text for text in said), said
    assert not any(value in text for text in said)


def test_what_only_resembles_it(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(
        '{"bytes": 19480211, "version": "2.15.0", "loss": 0.19480211, "sha": "a19480211b", "licence": "CC BY (2021)",'
        ' "pixels": [20190301, 1.5, 2.5], "url": "https://example.org/home/data", "year": "2023-24", "ip": "10.0.0.1"}'
    )
    assert found(tmp_path) == []


def test_tensor_files(tmp_path: Path) -> None:
    weights = {"head.weight": np.zeros(3, np.float32)}
    save_file(weights, tmp_path / "good.safetensors")
    assert found(tmp_path) == []
    save_file(weights, tmp_path / "made.safetensors", metadata={"by": "jane@clinic.org"})
    save_file({"19480211": weights["head.weight"]}, tmp_path / "named.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"\xff" * 9)
    places = [line.partition(":")[0] for line in found(tmp_path)]
    assert places == ["cut.safetensors, header", "made.safetensors, header", "named.safetensors, header"]


def test_figures_may_say_that_matplotlib_drew_them(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    Figure().savefig(tmp_path / "good.png")
    assert found(tmp_path) == []
    Figure().savefig(tmp_path / "bad.png", metadata={"Author": "Jane"})
    picture = base64.b64encode((tmp_path / "bad.png").read_bytes()).decode()
    (tmp_path / "report.html").write_text(f'<img src="data:image/png;base64,{picture}">')
    assert found(tmp_path) == ["bad.png: has a chunk tEXt", "report.html, picture 1: has a chunk tEXt"]


def test_what_is_not_understood_is_told(copied: Path, tmp_path: Path) -> None:
    (copied / "weights.pt").write_bytes(b"PK\3\4")
    (copied / "scan.dcm").write_bytes(b"\0" * 132)
    (copied / "more.log").write_bytes(b"one\0two")
    (copied / "elsewhere").symlink_to(tmp_path)
    said = found(copied)
    assert [line.partition(":")[0] for line in said] == ["elsewhere", "more.log", "scan.dcm", "weights.pt"]


# ---------------------------------------------------------------------------------------------- content


def test_windows_find_what_brute_force_finds() -> None:
    random = Random(5)
    for width in (4, 8):
        for _ in range(60):
            letters = b"ab" if random.random() < 0.5 else bytes(range(256))
            content = bytes(random.choices(letters, k=random.randrange(600)))
            needles = {bytes(random.choices(letters, k=random.randrange(1, 14))) for _ in range(40)}
            for _ in range(10):
                start = random.randrange(len(content) + 1)
                needles.add(content[start : start + random.randrange(width, 30)])
            expected = {
                (i, i + len(n))
                for n in needles
                if len(n) >= width
                for i in range(len(content))
                if content.startswith(n, i)
            }
            assert set(Windows(needles, width).find(content)) == expected


def test_windows_find_across_their_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Windows, "STEP", 16)
    content = bytes(range(200))
    needles = [content[i : i + 11] for i in range(189)]
    assert list(Windows(needles, 8).find(content)) == [(i, i + 11) for i in range(189)]


def every_value(path: Path) -> Iterator[tuple[str, str]]:
    """Keyword and text of every element, as pydicom shows them; values above the confidentiality profile, too."""
    dataset = dcmread(path)
    for element in (*dataset.file_meta, *dataset.iterall()):
        if element.VR not in ("SQ", "OW", "US") and element.keyword not in ("PixelData", "PatientAge"):
            value = element.value
            text = value.rstrip(b"\0").decode("latin-1") if isinstance(value, bytes) else str(value)
            yield element.keyword, text


def test_every_canary_of_the_profile_is_looked_for(tmp_path: Path) -> None:
    header = mammogram(np.zeros((64, 64), np.uint16))
    planted = plant(header)
    save(tmp_path / "a.dcm", header)
    values = Values(archive_values(tmp_path, tmp_path / "out", []))
    assert len(planted) > len(CANARIES) > 200
    assert [name for name, text in planted.items() if len(text) >= 8 and text.lower().encode() not in values.text] == []
    lacking = {
        k for k, text in every_value(tmp_path / "a.dcm") if "anary" in text and text.lower().encode() not in values.text
    }
    assert lacking == set()


def test_findings_name_the_tag_and_not_the_value(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    header = mammogram(np.zeros((64, 64), np.uint16), PatientName="Roe^Joan Mary", PatientID="QX-77120")
    header.private_block(0x07A3, "TAMAR", create=True).add_new(0x34, "LO", "21319 days old")
    save(source / "a.dcm", header)
    (out / "a.log").write_text("fine\nit was JOAN MARY's film\nof qx-77120\nwho was 21319 days old")
    assert found(out, source) == [
        "a.log, line 2: the value of PatientName (0010,0010)",
        "a.log, line 3: the value of PatientID (0010,0020)",
        "a.log, line 4: the value of private (07A3,1034)",
    ]
    assert found(out, source, "joan", "MARY", "joan mary", "QX-77120", "21319 days old") == []


def test_tags_that_are_openly_stored_are_searched_for_what_does_not_belong_there(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    code = Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = "R-10242", "SRT", "view of Roe Joan"
    told = {
        "BodyPartExamined": "SMITH ANNA",
        "ImageType": ["DERIVED", "PRIMARY", "ANNASMITH"],
        "Manufacturer": "Clinic Dr Meyer",
        "ViewPosition": "QUINCY",
        "PatientOrientation": ["A", "WILMA"],
        "ViewCodeSequence": [code],
        "SpecificCharacterSet": "ISO_IR 100",
    }
    write_dicom(source / "a.dcm", np.zeros((64, 64), np.uint16), **told)
    lines = ["smith anna", "annasmith", "clinic dr meyer", "quincy", "wilma", "view of roe joan"]
    (out / "a.log").write_text("\n".join(lines))
    tags = ("BodyPartExamined", "ImageType", "Manufacturer", "ViewPosition", "PatientOrientation", "CodeMeaning")
    said = found(out, source)
    assert len(said) == len(tags)
    assert all(
        f"line {i}: the value of {tag} " in line for i, (tag, line) in enumerate(zip(tags, said, strict=True), 1)
    )


def test_what_tags_and_data_sets_share_is_no_finding(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    spacing = {"ImagerPixelSpacing": ["0.065238095", "0.065238095"], "PixelSpacing": None}
    public = {"ClinicalTrialProtocolName": "CBIS-DDSM", "Manufacturer": "HOLOGIC", "BodyPartExamined": "BREAST"}
    write_dicom(source / "a.dcm", np.zeros((64, 64), np.uint16), ViewPosition="XCCL", **spacing, **public)
    (out / "a.json").write_text(
        '{"spacing_mm": 0.065238095, "view": "XCCL", "manufacturer": "hologic", "photometric": "MONOCHROME2",'
        ' "dataset": "cbis-ddsm", "presentation": "FOR PRESENTATION", "a": "primary breast"}'
    )
    assert found(out, source) == []


def labelled(folder: Path, name: str, labels: list[str]) -> Path:
    """What a set's manifest and index say, as far as the audit asks for it."""
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps({"dataset": name, "licence": "mine"}))
    (folder / "index.csv").write_text("key,label_kind\n" + "".join(f"k-{i},{x}\n" for i, x in enumerate(labels)))
    return folder


def test_the_own_name_and_folders_of_classes_are_counted_and_not_found(tmp_path: Path) -> None:
    for name in ("Our-Set/oedema", "Our-Set/Papilloma"):
        (tmp_path / "source" / name).mkdir(parents=True)
    (tmp_path / "source" / "our-set.csv").write_text("x\n1\n")
    out = labelled(tmp_path / "out", "our-set", ["oedema", "papilloma"])
    searched = Searched()
    assert list(audit(out, tmp_path / "source", searched=searched)) == []
    assert "names of files and folders not searched for: " in str(searched)
    assert "2 that are a value of label_kind" in str(searched)
    assert "2 that are the data set's own name" in str(searched)


@pytest.mark.parametrize("name", ["roe-joan", "ROE-JOAN"])
def test_no_header_value_file_or_odd_column_hides_behind_the_own_name(tmp_path: Path, name: str) -> None:
    source = tmp_path / "source"
    source.mkdir()
    write_dicom(source / "a.dcm", np.zeros((64, 64), np.uint16), PatientID="Roe-Joan")
    named = labelled(tmp_path / "named", name, ["x"])
    assert {"PatientID" in line for line in found(named, source)} == {True}
    label = labelled(tmp_path / "label", "set", [name])
    assert {"PatientID" in line for line in found(label, source)} == {True}
    (source / "a.dcm").rename(source / "roe-joan.dcm")
    assert found(label, source)
    for i in range(21):
        (source / f"quincy-{i:03d}").mkdir()
    many = labelled(tmp_path / "many", "set", [f"quincy-{i:03d}" for i in range(21)])
    assert len(found(many, source)) == 21


@pytest.mark.parametrize("make", [cbis_archive, cmmd_archive])
def test_public_archives_pass_with_their_source(make: Callable[[Path], Archive], tmp_path: Path) -> None:
    archive = make(tmp_path / "source")
    outcome = ingest(archive, tmp_path / "set", b"sixteen bytes or more", workers=1)
    assert outcome.samples > 5
    searched = Searched()
    assert [str(finding) for finding in audit(tmp_path / "set", tmp_path / "source", searched=searched)] == []
    assert searched.values > 30


def test_names_of_the_archives_files_and_cells_of_its_tables(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    (source / "roe-joan").mkdir(parents=True)
    out.mkdir()
    (source / "roe-joan" / "film_77.png").write_bytes(png())
    (source / "labels.csv").write_text("image file;Patient Id;view\na/b/scan88.png;MRN-4711;oblique\n")
    (out / "a.log").write_text("roe-joan\nfilm_77\nscan88.png\nMRN-4711\noblique, labels\n")
    said = found(out, source)
    assert [line.partition(":")[0] for line in said] == [f"a.log, line {i}" for i in (1, 2, 3, 4)]
    assert ["a folder's name" in said[0], "a file's name" in said[1]] == [True, True]
    assert "column 'Patient Id' of a table" in said[3]


def test_a_value_in_a_name_is_told_without_the_name(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    write_dicom(source / "a.dcm", np.zeros((64, 64), np.uint16), PatientID="QX-77120")
    (out / "QX-77120").mkdir(parents=True)
    (out / "QX-77120" / "notes.txt").write_text("/home/jdoe")
    said = found(out, source)
    assert len(said) == 2
    assert not any("77120" in line for line in said)


@pytest.mark.parametrize(
    ("text", "value", "hit"),
    [
        ("Mr Wong came", "wong", True),
        ("wongles", "wong", False),
        ("x_wong.png", "Wong", True),
        ("step 1200 of 5000", "1200", False),
        ('"patient": "1200"', "1200", True),
        ('"height": 1200', "1200", False),
        ("films/1200/a", "1200", True),
        ("loss 0.19480211", "19480211", False),
        ("born 19480211.", "19480211", True),
        ("a19480211", "19480211", False),
        ("xyABCDEFGHIJyx", "abcdefghij", True),
        ('"M\\u00fcller-Lai"', "MÜLLER-LAI", True),
        ("MÜLLER-LAI", "müller-lai", True),
        ("O&#x27;Neil &amp; Co", "O'Neil & Co", True),
        ("abc", "abc", False),
        ("aaaaaaaa", "aaaaaaaa", False),
        ("1.2.840.10008.1.2.1", "1.2.840.10008.1.2.1", False),
        ("breast", "BREAST", False),
    ],
)
def test_what_counts_as_found(text: str, value: str, hit: bool) -> None:
    assert bool(list(Values([(value, "")]).in_text(text.encode()))) is hit


def test_names_and_dates_are_looked_for_in_their_parts() -> None:
    assert {"Müller", "Jane", "Müller^Jane", "Jane Müller"} <= set(text_values("PN", "Müller^Jane=ミュラー"))
    assert {"19480211", "1948-02-11"} <= set(text_values("DA", "19480211"))
    assert {"19480211", "19480211101500"} <= set(text_values("DT", "19480211101500"))
    assert list(text_values("CS", "NORMAL")) == list(text_values("CS", "PRIMARY")) == []
    assert set(text_values("CS", "SMITH ANNA")) == {"SMITH ANNA"}
    assert list(text_values("DS", "0.07")) == []
    assert set(text_values("DS", "SMITH")) == {"SMITH"}
    assert set(text_values("LO", r"one\two")) == {r"one\two", "one", "two"}
    assert set(text_values("LT", "one line\r\nand more")) >= {"one line", "and more"}


@pytest.mark.parametrize("depth", [np.uint8, np.uint16])
@pytest.mark.parametrize("kind", ["png", "npy", "safetensors"])
def test_values_among_pixels_and_weights(depth: type[np.unsignedinteger], kind: str, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    write_dicom(source / "a.dcm", np.zeros((64, 64), np.uint16), PatientID="QX-77120-AB")
    pixels = np.random.default_rng(1).integers(0, 256, (40, 30)).astype(depth)
    files: dict[str, Callable[[], object]] = {
        "png": lambda: (out / "a.png").write_bytes(encode_png(pixels)),
        "npy": lambda: (out / "a.npy").write_bytes(encode_npy(pixels)),
        "safetensors": lambda: save_file({"a": pixels}, out / "a.safetensors"),
    }
    files[kind]()
    assert found(out, source) == []
    pixels[3, 4:15] = list(b"QX-77120-AB")  # a letter a pixel
    files[kind]()
    assert all("PatientID" in line for line in found(out, source))
    assert found(out, source)


def test_a_source_that_cannot_be_read_is_told(phantoms: Path, tmp_path: Path) -> None:
    write_dicom(tmp_path / "a.dcm", np.zeros((64, 64), np.uint16))
    whole = write_dicom(tmp_path / "b.dcm", np.zeros((64, 64), np.uint16), syntax="deflated").read_bytes()
    (tmp_path / "b.dcm").write_bytes(whole[:-200] + b"\xff" * 200)
    (tmp_path / "text.dcm").write_text("no DICOM")
    (tmp_path / "c.csv").write_bytes(b"patient\n\xff\xfe\n")
    said = found(phantoms, tmp_path)
    assert [Path(line.partition(":")[0]).name for line in said] == ["b.dcm", "c.csv", "text.dcm"]


def test_the_command(copied: Path, tmp_path: Path, miram: Callable[..., CompletedProcess[str]]) -> None:
    source = tmp_path / "source"
    source.mkdir()
    write_dicom(source / "a.dcm", np.zeros((64, 64), np.uint16), PatientID="QX-77120")
    clean = miram("data", "audit", copied, "--source", source)
    assert clean.returncode == 0, clean.stderr
    assert re.search(r"none of \d+ values", " ".join(clean.stdout.split()))
    (copied / "notes.txt").write_text("QX-77120")
    told = miram("data", "audit", copied, "--source", source)
    assert told.returncode == 2
    assert "notes.txt, line 1: the value of PatientID (0010,0020)" in told.stderr
    assert "77120" not in told.stdout + told.stderr
    assert miram("data", "audit", copied, "--source", source, "--allow", "qx-77120").returncode == 0
