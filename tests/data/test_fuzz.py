"""Five thousand damaged files: each is read, or refused by an exception that is documented; nothing hangs or runs.

    python tests/data/test_fuzz.py KIND FIRST END INPUTS      repeats cases FIRST … END-1; a failure tells INPUTS

A case is a pure function of its kind and number. Cases run in a process of their own, whose memory is limited, under a
watchdog: a crash in a decoder is told with its number, too.
"""

from __future__ import annotations

import faulthandler
import gzip
import io
import json
import os
import pickle
import resource
import shutil
import struct
import subprocess
import sys
import tarfile
import time
import traceback
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from functools import cache
from pathlib import Path
from random import Random

import numpy as np
import pytest
from PIL import Image

SENTINEL = "SOMETHING-RAN"
SLOW, HANGS = 30.0, 60  # seconds a case may take, and after which its process is ended
MEMORY = 2 * 2**30  # bytes beyond what the process has taken before its first case
KINDS = {"dicom": 1500, "png": 1500, "tar": 1000, "csv": 1000}
QUICK = {"dicom": 150, "png": 200, "tar": 120, "csv": 200}


class Runs:
    """Unpickled, it leaves a file behind."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return open, (SENTINEL, "w")


# ---------------------------------------------------------------------------------------------- damage

NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 10**6, 2**24, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1)


def flip(content: bytearray, random: Random) -> None:
    for _ in range(random.choice((1, 1, 3, 20))):
        content[place(content, random)] ^= 1 << random.randrange(8)


def overwrite_number(content: bytearray, random: Random) -> None:
    form = random.choice("<>") + random.choice("BHIQ")
    at = place(content, random)
    number = random.choice(NUMBERS) % 256 ** struct.calcsize(form)
    content[at : at + struct.calcsize(form)] = struct.pack(form, number)


def truncate(content: bytearray, random: Random) -> None:
    del content[place(content, random) :]


def remove(content: bytearray, random: Random) -> None:
    at = place(content, random)
    del content[at : at + random.choice((1, 2, 4, 100, 5000))]


def repeat(content: bytearray, random: Random) -> None:
    at = place(content, random)
    part = content[at : at + random.choice((1, 8, 64, 512))]
    content[at:at] = part * random.choice((1, 2, 50, 2000))


def zeros(content: bytearray, random: Random) -> None:
    at = place(content, random)
    content[at : at + random.choice((0, 1, 50))] = bytes(random.choice((1, 8, 512, 5000)))


def noise(content: bytearray, random: Random) -> None:
    at = place(content, random)
    content[at : at + random.choice((4, 40, 400))] = random.randbytes(random.choice((4, 40, 400)))


def place(content: bytearray, random: Random) -> int:
    """Somewhere in it, more often near its begin, where headers are."""
    return random.randrange(min(len(content), random.choice((40, 200, 1000, 10**9))) or 1) if content else 0


DAMAGE = (flip, flip, overwrite_number, overwrite_number, truncate, remove, repeat, zeros, noise)


def damaged(content: bytes, other: bytes, random: Random) -> bytes:
    """The content with one to three kinds of damage, or its begin with another's end."""
    if random.random() < 0.1:
        return content[: random.randrange(len(content) + 1)] + other[random.randrange(len(other) + 1) :]
    spoiled = bytearray(content)
    for _ in range(random.choice((1, 1, 2, 3))):
        random.choice(DAMAGE)(spoiled or bytearray(b"\0"), random)
    return bytes(spoiled)


# ---------------------------------------------------------------------------------------------- DICOM


def dicom_case(inputs: list[Path], folder: Path, random: Random) -> None:
    from miram.data.audit.search import Values, dicom_values
    from miram.data.dicom.reader import DicomOptions
    from miram.data.image import UnreadableImage
    from miram.data.reading import read_file

    first, second = (random.choice(inputs).read_bytes() for _ in range(2))
    path = folder / "case.dcm"
    rare = bomb if random.random() < 0.2 else damaged  # it takes seconds
    path.write_bytes(random.choice((nested, rare, *(damaged,) * 12))(first, second, random))
    options = DicomOptions(any_modality=True, for_processing=True, burned_in=True)
    with allowed(UnreadableImage):
        film = read_file(path, options)
        assert film.pixels.ndim == 2
        assert film.pixels.dtype in (np.uint8, np.uint16)
        assert film.pixels.max() <= film.max_value
    with allowed(UnreadableImage):
        Values(dicom_values(path))


def nested(content: bytes, other: bytes, random: Random) -> bytes:
    """Sequences in sequences, of undefined length, put before the pixels."""
    explicit = random.random() < 0.5
    start = b"\x08\x00\x40\x11" + (b"SQ\0\0" if explicit else b"") + b"\xff" * 4 + b"\xfe\xff\x00\xe0" + b"\xff" * 4
    at = content.find(b"\xe0\x7f\x10\x00")
    return content[:at] + start * random.choice((10, 500, 5000, 50_000)) + content[at:]


def bomb(content: bytes, other: bytes, random: Random) -> bytes:
    """A deflated file that unpacks to hundreds of megabytes of one element."""
    uid = b"1.2.840.10008.1.2.1.99"
    syntax = b"\x02\x00\x10\x00UI" + struct.pack("<H", len(uid)) + uid
    return b"\0" * 128 + b"DICM" + syntax + deflated(random.choice((10**6, 4 * 10**8)))


@cache
def deflated(size: int) -> bytes:
    packer = zlib.compressobj(1, zlib.DEFLATED, -15)
    head = packer.compress(b"\x09\x00\x10\x10OB\0\0" + struct.pack("<I", size))
    return b"".join([head, *(packer.compress(bytes(10**6)) for _ in range(size // 10**6)), packer.flush()])


# ---------------------------------------------------------------------------------------------- images


def png_case(inputs: list[Path], folder: Path, random: Random) -> None:
    from miram.data.image import UnreadableImage, decode_image, decode_png, read_film
    from miram.engine.errors import UserError

    first, second = random.choice(inputs), random.choice(inputs)
    change = random.choice((damaged,) * 3 + (chunks,)) if first.suffix == ".png" else damaged
    content = change(first.read_bytes(), second.read_bytes(), random)
    path = folder / f"case{random.choice((first.suffix, second.suffix))}"
    path.write_bytes(content)
    for decode in (decode_png, decode_image):
        with allowed(UserError):
            assert decode(content, "case").ndim in (2, 3)
    for channels in (1, 3):
        with allowed(UnreadableImage):
            film = read_film(path, channels=channels)  # type: ignore[arg-type]
            assert film.pixels.max() <= film.max_value


def chunks(content: bytes, other: bytes, random: Random) -> bytes:
    """A PNG whose checksums hold, with fields of its header, order and content of its chunks changed."""
    parts, at = [], 8
    while at + 12 <= len(content):
        length = int.from_bytes(content[at : at + 4], "big")
        parts.append((content[at + 4 : at + 8], bytearray(content[at + 8 : at + 8 + length])))
        at += 12 + length
    for _ in range(random.choice((1, 2, 3))):
        body = random.choice(parts)[1]
        random.choice((_change_head, _add_bomb, _shuffle, _damage_chunk))(parts, body, random)
    packed = (struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b)) for k, b in parts)
    return content[:8] + b"".join(packed)


Chunks = list[tuple[bytes, bytearray]]


def _change_head(parts: Chunks, body: bytearray, random: Random) -> None:
    head = parts[0][1]
    if random.random() < 0.5:
        sizes = (0, 1, 1000, 17_000, 30_000, 2**31 - 1, 2**32 - 1)
        head[:8] = struct.pack(">II", random.choice(sizes), random.choice(sizes))
    else:
        head[8:13] = bytes(random.choice((0, 1, 2, 3, 4, 6, 8, 16, 255)) for _ in range(5))


def _add_bomb(parts: Chunks, body: bytearray, random: Random) -> None:
    packed = zlib.compress(bytes(random.choice((10**5, 10**8))), 9)
    kinds = {b"zTXt": b"a\0\0", b"iTXt": b"a\0\1\0\0\0", b"iCCP": b"a\0\0", b"IDAT": b""}
    kind = random.choice(list(kinds))
    parts.insert(random.randrange(1, len(parts) + 1), (kind, bytearray(kinds[kind] + packed)))


def _shuffle(parts: Chunks, body: bytearray, random: Random) -> None:
    random.shuffle(parts)


def _damage_chunk(parts: Chunks, body: bytearray, random: Random) -> None:
    if body:
        random.choice(DAMAGE)(body, random)


# ---------------------------------------------------------------------------------------------- data sets


def tar_case(inputs: list[Path], folder: Path, random: Random) -> None:
    from miram.data.audit.look import audit
    from miram.data.foreign.adopt import adopt
    from miram.data.shards import ShardDataset
    from miram.data.verify import verify, verify_samples
    from miram.engine.errors import UserError

    case, adopted = folder / "set", folder / "adopted"
    shutil.rmtree(adopted, ignore_errors=True)
    shutil.rmtree(case, ignore_errors=True)
    shutil.copytree(random.choice([path for path in inputs if path.is_dir()]), case)
    spoil(case, random)
    with allowed(UserError):
        list(verify(case))
    with allowed(UserError):
        list(verify_samples(case))
    with allowed(UserError):
        shards = ShardDataset(case)
        assert shards.digest
        with allowed(UserError):
            assert len(shards.pixel_statistics) == 2
        for i in range(min(len(shards), 4)):
            with allowed(UserError):
                shards[i].pixels[:]
    with allowed(UserError):
        list(audit(case))
    with allowed(UserError), redirect_stderr(io.StringIO()):
        adopt(str(case), adopted, labels=(), dataset="foreign", patient=None, secret=b"x" * 16)
        list(verify_samples(adopted))


def spoil(case: Path, random: Random) -> None:
    """Damage the shard, the index or the manifest."""
    shard = random.choice(sorted(case.glob("*.tar")))
    turn = random.random()
    if turn < 0.35:
        shard.write_bytes(damaged(shard.read_bytes(), shard.read_bytes(), random))
    elif turn < 0.6:
        rewrite(shard, random)
    elif turn < 0.8:
        index = case / "index.csv"
        index.write_bytes(random.choice((damaged, cells))(index.read_bytes(), b"", random))
    else:
        manifest = case / "manifest.json"
        tree = json.loads(manifest.read_bytes())
        change_json(tree, random)
        spoiled = json.dumps(tree).encode()
        manifest.write_bytes(damaged(spoiled, b"", random) if random.random() < 0.3 else spoiled)


def rewrite(shard: Path, random: Random) -> None:
    """A sound tar with hostile members."""
    with tarfile.open(shard) as tar:
        members = [(info, tar.extractfile(info).read()) for info in tar]  # type: ignore[union-attr]
    for _ in range(random.choice((1, 3))):
        i = random.randrange(len(members))
        info, content = members[i]
        members[i] = (info, hostile(info, content, random))
    form = random.choice((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT))
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for info, content in members:
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    shard.write_bytes(gzip.compress(buffer.getvalue()) if random.random() < 0.1 else buffer.getvalue())


def hostile(info: tarfile.TarInfo, content: bytes, random: Random) -> bytes:
    turn = random.randrange(9)
    key = info.name.partition(".")[0]
    if turn == 0:
        info.name = random.choice(("../../x.png", "/etc/x.json", "a" * 300 + ".json", "x", ".json", f"{key}.png.png"))
    elif turn == 1:
        info.name = f"{key}.{random.choice(('pyd', 'pkl', 'pickle', 'pth', 'npz', 'pyd.gz', 'json', 'npy', 'cls'))}"
        return pickle.dumps(Runs())
    elif turn == 2:
        info.type = random.choice(
            (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, b"x", b"g", b"L", b"S")
        )
        info.linkname = "/etc/passwd"
    elif turn == 3:
        info.pax_headers = {
            random.choice(("path", "size", "GNU.sparse.map", "a")): random.choice(("9" * 30, "../x", "-1"))
        }
    elif turn == 4:
        info.name = f"{key}.npy"
        return objects(random)
    elif turn == 5 and info.name.endswith("json"):
        return random.choice(
            (b"[" * 100_000, b'{"a":' * 50_000, b"9" * 10_000, b"NaN", b'"\xff"', b"{}", b"1e999", b"")
        )
    elif turn == 6 and info.name.endswith("json"):
        with suppress(ValueError):  # it may be damaged already
            tree = json.loads(content)
            change_json(tree, random)
            return json.dumps(tree).encode()
    elif turn == 7 and info.name.endswith(".png"):
        return chunks(content, b"", random)
    return damaged(content, content, random)


def objects(random: Random) -> bytes:
    """Arrays that numpy would unpickle, or that promise more than there is."""
    buffer = io.BytesIO()
    if random.random() < 0.3:
        np.save(buffer, np.array([Runs()], object), allow_pickle=True)
    elif random.random() < 0.3:
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("a.npy", pickle.dumps(Runs()))
    else:
        shape = random.choice(("(0, 0)", "(2147483647, 2147483647)", "(-1, 5)", "(1,)", "(10**9, 10**9)", "(" * 500))
        head = f"{{'descr': '<u2', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
        buffer.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + bytes(100))
    return buffer.getvalue()


def change_json(tree: object, random: Random) -> None:
    """Replace or remove one value anywhere in it."""
    values = (
        None,
        True,
        -1,
        0,
        10**30,
        1e308,
        float("nan"),
        "",
        "x",
        "../x",
        "pipe:touch " + SENTINEL,
        [],
        {},
        [[]],
        [{}],
        "\0",
    )
    while isinstance(tree, dict | list) and tree:
        key = random.choice(list(tree)) if isinstance(tree, dict) else random.randrange(len(tree))
        if isinstance(tree[key], dict | list) and tree[key] and random.random() < 0.7:  # type: ignore[index]
            tree = tree[key]  # type: ignore[index]
        elif random.random() < 0.2:
            del tree[key]  # type: ignore[arg-type]
            return
        else:
            tree[key] = random.choice(values)  # type: ignore[index]
            return


# ---------------------------------------------------------------------------------------------- tables


def csv_case(inputs: list[Path], folder: Path, random: Random) -> None:
    from miram.data.audit.search import Values, archive_values
    from miram.data.shards import ShardDataset
    from miram.data.sources.labels import read_table
    from miram.data.sources.tables import read_csv
    from miram.data.splits import read_split
    from miram.data.table import Table
    from miram.engine.errors import UserError

    first, second = (random.choice(inputs).read_bytes() for _ in range(2))
    content = random.choice((damaged, cells, cells))(first, second, random)
    path = folder / "tables" / "case.csv"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    for read in (read_table, lambda p: read_csv(p, ("file", "patient")), lambda p: read_csv(p, (), ";"), read_split):
        with allowed(UserError):
            read(path)
    with allowed(ValueError):
        Table.parse(content)
    Values(archive_values(path.parent, folder / "out", []))
    case = folder / "indexed"
    if not case.exists():
        shutil.copytree(next(p for p in inputs[0].parent.parent.joinpath("tar").iterdir()), case)
    (case / "index.csv").write_bytes(content)
    with allowed(UserError):
        shards = ShardDataset(case)
        for i in range(min(len(shards), 3)):
            with allowed(UserError):
                shards[i].pixels[:]
        shards.labels("mass")


CELLS = (
    *("", " ", '"', '""', '"a\nb"', "\0", "\r", "é", "\ufeff", "nan", "inf", "-1", "1e999", "9" * 400, "0x10", "١٢"),
    *(f"=cmd|'/C touch {SENTINEL}'!A0", f"$(touch {SENTINEL})", f"`touch {SENTINEL}`", f"| touch {SENTINEL}"),
    *(f"pipe:touch {SENTINEL}", "../../etc/passwd", "/dev/zero", "a" * 140_000, "http://[", "a::b", "file:///dev/zero"),
    *("a.png", "\ud7ff", "1,2,3", ";" * 50, ",".join("x" * 2000), "18446744073709551616", "-9223372036854775809"),
)


def cells(content: bytes, other: bytes, random: Random) -> bytes:
    """A table with odd cells, rows, separators or encodings."""
    rows = [line.split(",") for line in content.decode("utf-8", "replace").splitlines()]
    for _ in range(random.choice((1, 2, 8))):
        row = rows[0] if random.random() < 0.25 else random.choice(rows)
        turn = random.random()
        if turn < 0.7 and row:
            row[random.randrange(len(row))] = random.choice(CELLS)
        elif turn < 0.8:
            row.insert(random.randrange(len(row) + 1), random.choice(CELLS))
        elif turn < 0.9 and row:
            row.pop(random.randrange(len(row)))
        else:
            rows.insert(random.randrange(len(rows) + 1), list(random.choice(rows)))
    text = random.choice(("\n", "\n", "\r\n", "\r")).join(random.choice(",,,;\t").join(row) for row in rows)
    return text.encode(random.choice(("utf-8",) * 6 + ("utf-16", "utf-8-sig", "utf-7")), "replace")


# ---------------------------------------------------------------------------------------------- running cases

CASES = {"dicom": dicom_case, "png": png_case, "tar": tar_case, "csv": csv_case}


@contextmanager
def allowed(*exceptions: type[Exception]) -> Iterator[None]:
    """Let these pass if they say something, and nothing that only the header holds."""
    try:
        yield
    except exceptions as error:
        if not str(error) or "canary" in str(error).lower():
            raise AssertionError(f"it says {str(error)!r}") from error


def work(kind: str, first: int, end: int, inputs: Path) -> None:
    """Run cases; print a line of JSON for each that fails, and one at the end."""
    warnings.simplefilter("ignore")
    from miram.data.dicom import decoder as dicom_decoder

    dicom_decoder.PATIENCE = 4.0
    files = sorted((inputs / kind).iterdir())
    folder = inputs.parent / f"work-{kind}-{first}"
    folder.mkdir(exist_ok=True)
    os.chdir(folder)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))
    for number in range(first, end):
        (folder / "number").write_text(str(number))
        faulthandler.dump_traceback_later(HANGS, exit=True)
        begun, random = time.perf_counter(), Random(f"{kind} {number}")
        try:
            CASES[kind](files, folder, random)
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            where = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames[:-4:-1])
            print(json.dumps([number, f"{type(error).__name__}: {str(error)[:200]} ({where})"]))
        if (taken_s := time.perf_counter() - begun) > SLOW:
            print(json.dumps([number, f"took {taken_s:.0f} s"]))
        faulthandler.cancel_dump_traceback_later()
    print(json.dumps(["done", peak_bytes()]))


def peak_bytes() -> int:
    """Most memory of this very program; ru_maxrss also counts what the process that started it had."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def run_cases(kind: str, first: int, end: int, inputs: Path) -> list[str]:
    """What went wrong in these cases, the number of each told."""
    command = [sys.executable, __file__, kind, str(first), str(end), str(inputs)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(inputs / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=3000, env=environment)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    failed = [f"{kind} {number}: {what}" for number, what in lines if number != "done"]
    folder = inputs.parent / f"work-{kind}-{first}"
    if not any(number == "done" for number, _ in lines):
        failed.append(f"{kind} {(folder / 'number').read_text()}: ended its process; {done.stderr[-1500:]}")
    failed += [f"{kind}: something in {path} ran" for path in inputs.parent.rglob(SENTINEL)]
    peaks = [peak for number, peak in lines if number == "done"]
    failed += [f"{kind}: {peak / 1e6:.0f} MB of memory" for peak in peaks if peak > MEMORY]
    shutil.rmtree(folder)
    return [*failed, f"INPUTS is {inputs}"] if failed else []


# ---------------------------------------------------------------------------------------------- sound inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, phantoms: Path) -> Path:
    """A folder of sound files for each kind."""
    base = tmp_path_factory.mktemp("fuzz") / "inputs"
    for kind in KINDS:
        (base / kind).mkdir(parents=True)
    write_dicoms(base / "dicom")
    write_images(base / "png")
    write_sets(base / "tar", phantoms)
    write_tables(base / "csv", phantoms)
    return base


def write_dicoms(folder: Path) -> None:
    from .dicoms import SYNTAXES, lut, mammogram, plant, save, write_dicom

    y, x = np.mgrid[:80, :70]
    pixels = (20 * y + 10 * x).astype(np.uint16)
    for syntax in SYNTAXES:
        write_dicom(
            folder / f"{syntax}.dcm", pixels if syntax != "jpeg" else (pixels >> 4).astype(np.uint8), syntax=syntax
        )
    table = lut(np.arange(4096, dtype=np.uint16)[::-1], 0, 12)
    write_dicom(folder / "lut.dcm", pixels, VOILUTSequence=[table], syntax="implicit")
    write_dicom(
        folder / "window.dcm", pixels, WindowCenter=[2000, 100], WindowWidth=[3000, 7], VOILUTFunction="SIGMOID"
    )
    write_dicom(
        folder / "signed.dcm",
        pixels.astype(np.int16) - 900,
        PixelPaddingValue=-900,
        RescaleSlope="2",
        RescaleIntercept="1",
    )
    canaries = mammogram(pixels)
    plant(canaries)
    save(folder / "canaries.dcm", canaries)


def write_images(folder: Path) -> None:
    y, x = np.mgrid[:60, :50]
    wide, narrow = (x * 800 + y * 300).astype(np.uint16), (x * 3 + y).astype(np.uint8)
    for suffix in ("png", "tif", "pgm"):
        Image.fromarray(wide).save(folder / f"wide.{suffix}")
    for suffix in ("png", "tif", "pgm", "bmp", "jpg"):
        Image.fromarray(narrow).save(folder / f"narrow.{suffix}")
    colour = Image.fromarray(np.stack([narrow, narrow[::-1], narrow[:, ::-1]], 2))
    for suffix in ("png", "tif", "bmp", "jpg"):
        colour.save(folder / f"colour.{suffix}")
    colour.quantize(16).save(folder / "palette.png")
    colour.convert("RGBA").save(folder / "alpha.png")
    Image.fromarray(narrow > 90).save(folder / "bit.png")
    Image.fromarray(wide).save(folder / "packed.tif", compression="tiff_adobe_deflate")
    Image.fromarray(narrow).save(folder / "lzw.tif", compression="tiff_lzw")
    colour.save(folder / "exif.jpg", exif=Image.Exif(), progressive=True)


def write_sets(folder: Path, phantoms: Path) -> None:
    from miram.data.derive import derive
    from miram.data.geometry import Size

    shutil.copytree(phantoms, folder / "png")
    derive(phantoms, folder / "npy", Size(), packed=True, workers=1)


def write_tables(folder: Path, phantoms: Path) -> None:
    shutil.copy(phantoms / "index.csv", folder)
    (folder / "labels.csv").write_text(
        "file,patient,exam,laterality,view,split,spacing_mm,mass\n"
        + "".join(f"a/{i}.png,p{i // 2},e{i},{'LR'[i % 2]},CC,train,0.07,{i % 2}\n" for i in range(30))
    )
    (folder / "quoted.csv").write_text('file,patient,note\n"a\nb.png","p, 1","say ""yes"""\nc.png,p2,\n')
    (folder / "wide.csv").write_text(",".join(f"c{i}" for i in range(200)) + "\n" + ",".join("1" * 200) + "\n")


# ---------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_read_or_refused(kind: str, inputs: Path) -> None:
    failed = run_cases(kind, 0, QUICK[kind], inputs)
    assert not failed, "\n".join(failed)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_thousands_of_damaged_files_are_read_or_refused(kind: str, inputs: Path) -> None:
    failed = run_cases(kind, QUICK[kind], KINDS[kind], inputs)
    assert not failed, "\n".join(failed)


def test_the_harness_notices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong exception, something that runs, a process that ends and too much memory are told."""
    spoiled = tmp_path / "inputs"
    (spoiled / "csv").mkdir(parents=True)  # no inputs: every case fails with IndexError
    assert [line.partition(":")[0] for line in run_cases("csv", 3, 5, spoiled)[:2]] == ["csv 3", "csv 4"]
    (tmp_path / SENTINEL).touch()
    assert any("ran" in line for line in run_cases("csv", 0, 0, spoiled))
    monkeypatch.chdir(tmp_path)
    assert pickle.loads(pickle.dumps(Runs())).name == SENTINEL


if __name__ == "__main__":
    work(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
