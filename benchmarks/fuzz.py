"""Fuzzing of the readers of outside files: no input may run a program or touch a file outside.

    python benchmarks/fuzz.py --reader checkpoint --minutes 10 --seed 1
    python benchmarks/fuzz.py --list

A row of TARGETS is a reader: small good files to begin with, mutators, the call, and the first
check that an input has to pass to count (a checksum, a signature, a manifest). A mutator changes
what is inside and then makes checksums and tables right again, so that the input gets that far.

Each input is read in a forked child. An audit hook reports every event that would act outside the
folder of the input; the child measures its time and the peak of its resident memory, and the parent
kills a child that does not answer. An input fails if it

    ran      a program, an import of a module of its own choice, or code
    touched  a file outside its folder: write, remove, rename, link, or read of the canary
    hung     longer than HANG seconds of a processor, or PATIENCE seconds on the clock
    grew     by more than 512 MiB + 4 x the size of the input
    crashed  the process
    raised   an exception that the command line would show with a traceback

The row in rows/fuzz.jsonl has the seed, the counts, the worst time and memory, the versions. Failed
inputs are kept in --keep FOLDER; `--replay FILE --reader NAME` reads one of them again.
"""

import argparse
import contextlib
import io
import json
import os
import pickle
import pickletools
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

HANG = 10.0  # seconds of a processor: others may use the machine
PATIENCE = 90.0  # seconds on the clock, for a reader that waits
MEMORY = 512 * 2**20  # bytes, beside 4 x the input
BATCH = 200  # inputs a child
ACTS = (
    *("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.startfile", "pty.spawn"),
    *("subprocess.Popen", "socket.connect", "socket.bind", "urllib.Request", "os.fork"),
    *("os.forkpty", "os.kill", "os.putenv", "ctypes.dlopen", "code.__new__"),
)
CHANGES = (
    *("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate"),
    *("os.chmod", "os.chown", "shutil.rmtree", "shutil.move", "os.utime"),
)
Files = dict[str, bytes]  # an input: its files by name; the first one is handed to the reader
Mutator = Callable[[random.Random, Files], Files]


@dataclass
class Target:
    """A reader of outside files.

    Args:
        seeds: makes good inputs.
        read: reads one, given the path of its first file or, if `folder`, of its folder.
        mutators: each changes an input; bytes of any file are changed by all targets besides.
        passes: whether an input passes the reader's first check.
        folder: whether the reader gets the folder.
    """

    seeds: Callable[[], list[Files]]
    read: Callable[[Path], Any]
    mutators: list[Mutator]
    passes: Callable[[Path], bool]
    folder: bool = False


# ---- mutators that any target may use

ODD = (
    0,
    1,
    -1,
    127,
    128,
    255,
    256,
    2**15,
    2**16,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**62,
    2**63,
    -(2**31),
)
WORDS = (
    *("os", "system", "os.system", "builtins", "eval", "canary_module", "canary_module.Thing"),
    *("../../canary", "/etc/passwd", "", ".", "..", "a/b", "\0", "nan", "1e999", "-1", "\ud83d"),
    *("torch.hub.load", "subprocess.Popen", "!!python/object/apply:os.system", "x" * 300),
)


def change_bytes(dice: random.Random, content: bytes) -> bytes:
    """A few bytes flipped, cut out, doubled, or replaced by an odd number or word."""
    data = bytearray(content)
    for _ in range(dice.choice((1, 1, 2, 4, 16))):
        place, length = dice.randrange(len(data) + 1), dice.choice((1, 1, 2, 4, 8, 32, 200))
        match dice.randrange(7):
            case 0 if place < len(data):
                data[place] ^= 1 << dice.randrange(8)
            case 1 if place < len(data):
                data[place] = dice.randrange(256)
            case 2:
                del data[place : place + length]
            case 3:
                data[place:place] = data[place : place + length] * dice.choice((1, 2, 50))
            case 4:
                number = dice.choice(ODD) % 2**64
                data[place : place + 8] = number.to_bytes(8, dice.choice(("big", "little")))
            case 5:
                data[place:place] = dice.choice(WORDS).encode("utf-8", "surrogatepass")
            case 6:
                other = dice.randrange(len(data) + 1)
                data[place : place + length] = data[other : other + length]
    return bytes(data)


def any_bytes(dice: random.Random, files: Files) -> Files:
    """Change bytes of one file, checksums left wrong."""
    name = dice.choice(list(files))
    return files | {name: change_bytes(dice, files[name])}


def odd_value(dice: random.Random, value: Any) -> Any:
    """A value of another type, too large, nested or shared, which replaces the given one."""
    bomb: Any = [1]
    for _ in range(12):
        bomb = [bomb] * 9
    deep: Any = 0
    for _ in range(dice.choice((10, 150, 400))):
        deep = [deep]
    choices = [None, True, -1, 0, dice.choice(ODD), 1e308, float("nan"), dice.choice(WORDS), [], {},
               [value], {"a": value}, {1: value}, bomb, deep, b"x", (), "x" * 1000,
               {"class_path": dice.choice(WORDS), "init_args": {}}]  # fmt: skip
    return dice.choice(choices)


def change_value(dice: random.Random, value: Any, chance: float = 0.3) -> Any:
    """A tree of plain values with one of them replaced, removed or moved."""
    if isinstance(value, dict) and value and dice.random() > chance:
        key = dice.choice(list(value))
        match dice.randrange(8):
            case 0:
                return {k: v for k, v in value.items() if k != key}
            case 1:
                return value | {dice.choice(WORDS): value[key]}
            case _:
                return value | {key: change_value(dice, value[key], chance)}
    if isinstance(value, list | tuple) and value and dice.random() > chance:
        place = dice.randrange(len(value))
        items = list(value)
        items[place] = change_value(dice, items[place], chance)
        return type(value)(items) if type(value) in (list, tuple) else items
    return odd_value(dice, value)


def change_pickle(dice: random.Random, content: bytes) -> bytes:
    """A pickle with operations removed, doubled, exchanged or given other arguments."""
    try:
        places = [place for _, _, place in pickletools.genops(content)]
    except Exception:
        return change_bytes(dice, content)
    ends = [*places[1:], len(content)]
    ops = [content[a:b] for a, b in zip(places, ends, strict=True)]
    for _ in range(dice.choice((1, 1, 2, 5))):
        at = dice.randrange(len(ops))
        match dice.randrange(6):
            case 0:
                del ops[at]
                ops = ops or [b"."]
            case 1:
                ops.insert(at, dice.choice(ops))
            case 2:
                ops[at] = dice.choice(ops)
            case 3:
                module, name = dice.choice((("os", "system"), ("builtins", "bytearray"),
                    ("torch", "load"), ("canary_module", "Thing"), ("collections", "OrderedDict"),
                    ("torch._utils", "_rebuild_tensor_v2"), ("builtins", "set")))  # fmt: skip
                ops.insert(at, f"c{module}\n{name}\n".encode())
            case 4:
                number = dice.choice(ODD)
                ops[at] = pickle.LONG1 + bytes([9]) + (number % 2**71).to_bytes(9, "little")
            case 5:
                word = dice.choice(WORDS).encode("utf-8", "surrogatepass")
                ops[at] = b"X" + len(word).to_bytes(4, "little") + word
    return b"".join(ops)


def repack(content: bytes, change: Callable[[str, bytes], bytes]) -> bytes:
    """The archive of torch.save with each record changed, lengths and checksums made right."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w") as new:
        for entry in old.infolist():
            info = zipfile.ZipInfo(entry.filename)
            info.create_system = 0  # no rights of a file, which torch does not write either
            with new.open(info, "w") as record:
                record.write(change(entry.filename, old.read(entry)))
            info.external_attr = 0
    return out.getvalue()


# ---- the readers


def _refused(error: Exception) -> bool:
    """Whether the command line would show the exception without a traceback."""
    from ravine.cli import error_report

    return error_report.exit_status(error_report.unwrap_error(error)) is not None


def _model() -> dict[str, Any]:
    """A checkpoint of a tiny language model, as `lightning fit` writes it."""
    from ravine.datamodules.tokenizers import ByteTokenizer
    from ravine.lightning_modules import LanguageModel

    shape = {"vocab_size": 256, "context_length": 8, "num_layers": 1, "d_model": 8, "num_heads": 2}
    model = LanguageModel(**shape)
    model.tokenizer = ByteTokenizer()
    model.configure_model()
    checkpoint: dict[str, Any] = {
        "state_dict": model.state_dict(),
        "hyper_parameters": dict(model.hparams),
        "epoch": 0,
        "global_step": 2,
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {"Checkpoint[val/loss]": {"best_k_models": {"a.ckpt": 1.0}, "dirpath": "a"}},
        "ravine": {"version": 1, "world_size": 1, "config": {
            "model": {"class_path": "ravine.lightning_modules.LanguageModel", "init_args": shape},
            "data": None, "seed_everything": 1, "trainer.name": "a", "trainer.callbacks": None}},
    }  # fmt: skip
    model.on_save_checkpoint(checkpoint)
    return checkpoint


def _saved(value: Any) -> bytes:
    memory = io.BytesIO()
    torch.save(value, memory)
    return memory.getvalue()


def checkpoint_seeds() -> list[Files]:
    torch.manual_seed(0)
    plain = {"state_dict": {"a": torch.randn(3, 4), "b": torch.ones(2)}, "epoch": 1}
    return [{"a.ckpt": _saved(_model())}, {"a.ckpt": _saved(plain)}]


def change_record(dice: random.Random, files: Files) -> Files:
    """Change the pickle of a checkpoint, or another record, the archive made right again."""
    inside = dice.random() < 0.9

    def change(name: str, content: bytes) -> bytes:
        if inside == name.endswith("data.pkl"):
            return (change_pickle if inside else change_bytes)(dice, content)
        return content

    return files | {"a.ckpt": repack(files["a.ckpt"], change)}


def change_tree(dice: random.Random, files: Files) -> Files:
    """Change a value of a checkpoint, and save it again."""
    tree = torch.load(io.BytesIO(files["a.ckpt"]), weights_only=True)
    for _ in range(dice.choice((1, 1, 2, 4))):
        tree = change_value(dice, tree, 0.1)
    try:
        return files | {"a.ckpt": _saved(tree)}
    except Exception:  # a value that cannot be saved
        return change_record(dice, files)


def read_checkpoint(path: Path) -> None:
    from ravine.cli import checkpoint_metadata, loading
    from ravine.cli.config import saved_config
    from ravine.strategies.checkpoint.atomic_io import (
        AtomicCheckpointIO,
        collective_loading,
        find_damage,
    )

    find_damage(path)
    with collective_loading(mapped_sections=("state_dict", "callbacks")):
        touch(AtomicCheckpointIO().load_checkpoint(path))
    AtomicCheckpointIO().load_checkpoint(path)
    config = saved_config.load_saved_config(path)
    if config:
        saved_config.to_argv(config, [])
    checkpoint_metadata.load_metadata(path)
    loading.load_model(path)


def touch(value: Any) -> None:
    """Read every number of a tree's tensors: those of a mapped file are read now."""
    from torch.utils._pytree import tree_leaves

    for leaf in tree_leaves(value):
        if isinstance(leaf, torch.Tensor) and not leaf.is_meta:
            leaf.clone()


def whole_archive(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as table:
            return table.testzip() is None and bool(table.namelist())
    except Exception:
        return False


def sharded_seeds() -> list[Files]:
    from torch.distributed.checkpoint import FileSystemWriter, save

    from ravine.strategies.checkpoint import sharded, sharded_index

    checkpoint = _model()
    tensors, rest = sharded.split_tensors(checkpoint)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        named = {sharded_index.encode_path(place): t for place, t in tensors.items()}
        save(named, storage_writer=FileSystemWriter(folder, thread_count=1), no_dist=True)
        torch.save(rest, Path(folder, "meta.pt"))
        files = {p.name: p.read_bytes() for p in sorted(Path(folder).iterdir())}
    return [sealed(files)]


def sealed(files: Files) -> Files:
    """With a manifest that has the right sizes and checksums."""
    rest = {name: content for name, content in files.items() if name != "manifest.json"}
    sums = {name: [len(content), zlib.crc32(content)] for name, content in rest.items()}
    return rest | {"manifest.json": json.dumps({"format": 1, "files": sums}).encode()}


def change_part(dice: random.Random, files: Files) -> Files:
    """Change the index, the rest or a part of a folder; the manifest is made right again."""
    name = dice.choice([".metadata", ".metadata", "meta.pt", "meta.pt", "__0_0.distcp"])
    content = files[name]
    if name == ".metadata":
        content = change_pickle(dice, content)
    elif name == "meta.pt" and dice.random() < 0.8:
        content = change_record(dice, {"a.ckpt": content})["a.ckpt"]
    else:
        content = change_bytes(dice, content)
    return sealed(files | {name: content})


def json_text(value: Any, limit: int = 2**20) -> str:
    """The first `limit` characters as JSON: parts that are shared may unfold without end."""
    pieces, size = [], 0
    for piece in json.JSONEncoder().iterencode(value):
        pieces.append(piece)
        size += len(piece)
        if size > limit:
            break
    return "".join(pieces)[:limit]


def change_manifest(dice: random.Random, files: Files) -> Files:
    """Change the manifest itself, or leave a part out."""
    if dice.random() < 0.3:
        name = dice.choice(list(files))
        return sealed({n: c for n, c in files.items() if n != name})
    manifest = change_value(dice, json.loads(files["manifest.json"]), 0.2)
    try:
        text = json_text(manifest)
    except (RecursionError, TypeError, ValueError, MemoryError):
        text = "[" * 100_000
    return files | {"manifest.json": text.encode("utf-8", "surrogatepass")}


def whole_folder(path: Path) -> bool:
    try:
        files = json.loads((path / "manifest.json").read_bytes())["files"]
        return all(
            [len(c := (path / n).read_bytes()), zlib.crc32(c)] == s for n, s in files.items()
        )
    except Exception:
        return False


ROWS_EXAMPLE = [{"prompt": f"what is {n}? 天 é", "answer": f"{n} 😀\n"} for n in range(6)]


def dumped(value: Any, ascii_only: bool = True) -> bytes:
    """The first 65,536 characters of a value as JSON; shared parts may unfold to billions."""
    found, size = [], 0
    for part in json.JSONEncoder(ensure_ascii=ascii_only).iterencode(value):
        found.append(part)
        size += len(part)
        if size > 2**16:
            break
    return "".join(found).encode("utf-8", "surrogatepass")


def rows_seeds() -> list[Files]:
    import ravine.datamodules  # noqa: F401 - before the children, each of which would wait for it

    lines = "\n".join(json.dumps(row) for row in ROWS_EXAMPLE).encode()
    listed = json.dumps(ROWS_EXAMPLE, indent=1, ensure_ascii=False).encode()
    return [{"a.jsonl": lines}, {"a.json": listed}, {"a.ndjson": b"\xef\xbb\xbf" + lines}]


def change_json(dice: random.Random, files: Files) -> Files:
    """Change values of the JSON file of an input, of one line where there are several."""
    name = dice.choice([n for n in files if "json" in n])
    content = files[name].removeprefix(b"\xef\xbb\xbf")
    parts = [content] if name.endswith(".json") else content.split(b"\n")
    at = dice.randrange(len(parts))
    value = json.loads(parts[at])
    for _ in range(dice.choice((1, 1, 2, 4))):
        value = change_value(dice, value, 0.1)
    parts[at] = dumped(value, dice.random() < 0.5)
    return files | {name: b"\n".join(parts)}


def read_rows(path: Path) -> None:
    from ravine.datamodules import InstructionDataModule, PromptDataModule

    refused = None
    for data in (
        InstructionDataModule(path, tokenizer="bytes"),
        PromptDataModule(path, num_val_prompts=1),
    ):
        try:
            data.setup("fit")
        except Exception as error:
            if not _refused(error):
                raise
            refused = error
    if refused is not None:
        raise refused


def all_json(path: Path) -> bool:
    """Whether the JSON of a file, or of a folder, can be parsed."""
    try:
        for file in path.glob("*json*") if path.is_dir() else [path]:
            text = file.read_text(encoding="utf-8-sig")
            for part in [text] if file.suffix == ".json" else text.split("\n"):
                json.loads(part)
    except (ValueError, RecursionError):
        return False
    return True


def png_chunks(content: bytes) -> list[tuple[bytes, bytes]]:
    """Name and content of each chunk."""
    chunks, place = [], 8
    while place + 8 <= len(content):
        length = int.from_bytes(content[place : place + 4], "big")
        chunks.append((content[place + 4 : place + 8], content[place + 8 : place + 8 + length]))
        place += 12 + length
    return chunks


def png_of(chunks: list[tuple[bytes, bytes]]) -> bytes:
    """A PNG of these chunks, their lengths and checksums right."""
    parts = [
        len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")
        for name, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def image_seeds() -> list[Files]:
    """A small image in each format and mode that is read, and some that are not."""
    import numpy
    from PIL import Image

    numbers = numpy.random.RandomState(0)
    photo = Image.fromarray(numbers.randint(0, 256, (9, 7, 3), dtype=numpy.uint8))
    deep = Image.fromarray(numbers.randint(0, 65536, (9, 7)).astype(numpy.uint16))
    exif = photo.getexif()
    exif[0x0112] = 6
    more = {"save_all": True, "append_images": [photo.rotate(180), photo]}
    made = [
        (photo, "PNG", {"exif": exif}), (photo, "PNG", {"transparency": (0, 0, 0)}),
        (photo.convert("RGBA"), "PNG", {}), (photo.convert("P"), "PNG", {"transparency": 3}),
        (photo.convert("1"), "PNG", {}), (photo.convert("LA"), "PNG", {}), (deep, "PNG", {}),
        (photo, "PNG", more), (photo, "JPEG", {"exif": exif}), (photo.convert("CMYK"), "JPEG", {}),
        (photo.convert("L"), "JPEG", {"progressive": True}), (photo, "GIF", {}),
        (photo, "GIF", more), (photo, "WEBP", {"exif": exif}), (photo.convert("RGBA"), "WEBP", {}),
        (photo, "WEBP", more), (photo, "BMP", {}), (photo.convert("P"), "BMP", {}),
        (photo, "TIFF", {"exif": exif}), (photo, "TIFF", {"compression": "tiff_lzw"}),
        (photo, "TIFF", {"compression": "jpeg"}), (photo.convert("1"), "TIFF", {"compression":
        "group4"}), (deep, "TIFF", {"compression": "tiff_deflate"}), (photo, "TIFF", more),
        (photo, "ICO", {}), (photo, "EPS", {}), (photo, "PPM", {}), (photo, "SGI", {}),
    ]  # fmt: skip
    seeds = []
    for image, form, options in made:
        memory = io.BytesIO()
        image.save(memory, form, **options)
        seeds.append({f"a.{'png' if form in ('ICO', 'EPS', 'PPM', 'SGI') else form.lower()}":
                      memory.getvalue()})  # fmt: skip
    return seeds


def change_image(dice: random.Random, files: Files) -> Files:
    """Change chunks of a PNG, checksums and compression right; of other formats what follows."""
    (name, content), *_ = files.items()
    if not content.startswith(b"\x89PNG"):
        keep = dice.choice((4, 12, 20, 30))
        return {name: content[:keep] + change_bytes(dice, content[keep:])}
    chunks = png_chunks(content)
    at = dice.randrange(len(chunks))
    kind, data = chunks[at]
    match dice.randrange(6):
        case 0:
            del chunks[at]
        case 1:
            chunks.insert(dice.randrange(len(chunks)), chunks[at])
        case 2 if kind in (b"IDAT", b"fdAT"):
            head = data[:4] if kind == b"fdAT" else b""
            plain = change_bytes(dice, zlib.decompress(data[len(head) :]))
            chunks[at] = kind, head + zlib.compress(plain)
        case 3:
            chunks[0] = b"IHDR", change_bytes(dice, chunks[0][1])
        case 4:
            kinds = (b"tRNS", b"PLTE", b"eXIf", b"iCCP", b"zTXt", b"acTL", b"fcTL", b"fdAT")
            text = dice.choice((data, b"a\0\0" + zlib.compress(b"\0" * 10**7), b"\xff" * 40))
            chunks.insert(1, (dice.choice(kinds), text))
        case _:
            chunks[at] = kind, change_bytes(dice, data)
    return {name: png_of(chunks)}


def enlarge_image(dice: random.Random, files: Files) -> Files:
    """An image whose small file unfolds to many pixels."""
    from PIL import Image

    side = dice.choice((1000, 3000, 4990, 5100, 8000))
    image = Image.new(dice.choice(("1", "L", "P", "RGB", "RGBA", "LA")), (side, side))
    form = dice.choice(("PNG", "GIF", "TIFF")) if side < 4000 else "PNG"
    memory = io.BytesIO()
    options = {"compression": "tiff_deflate"} if form == "TIFF" else {}
    (image.convert("P") if form == "GIF" else image).save(memory, form, **options)
    return {f"a.{form.lower()}": memory.getvalue()}


def sometimes_large(dice: random.Random, files: Files) -> Files:
    """Seldom: it takes a hundred times as long to read."""
    return enlarge_image(dice, files) if dice.random() < 0.02 else change_image(dice, files)


def read_image(path: Path) -> None:
    from ravine.datamodules.image_folders import read_images

    refused = None
    for mode, resize in (("auto", None), ("rgb", None), ("gray", (4, 6))):
        try:
            read_images(path, mode, resize)
        except ValueError as error:
            refused = error if _refused(error) or refused is None else refused
            if not _refused(error):
                raise
    if refused:
        raise refused


def known_image(path: Path) -> bool:
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Image.open(path).close()
    except Exception:
        return False
    return True


def tokenizer_seeds() -> list[Files]:
    from ravine.datamodules import BPETokenizer, ByteTokenizer, CharTokenizer, FileTokenizer
    from ravine.datamodules.tokenizers import NumberTokenizer

    pieces = [bytes([n]) for n in range(256)] + [b"th", b"the", b" the"]
    merges = [(b"t", b"h"), (b"th", b"e"), (b" ", b"the")]
    file = FileTokenizer.from_merges(dict(enumerate(pieces)), merges, ["<|endoftext|>"])
    content = json.loads(file.json_text)
    config = json.dumps({"eos_token": "<|endoftext|>"}).encode()
    found: list[Files] = [
        {"tokenizer.json": file.json_text.encode(), "tokenizer_config.json": config},
        {"vocab.json": json.dumps(content["model"]["vocab"]).encode(),
         "merges.txt": "\n".join(" ".join(m) for m in content["model"]["merges"]).encode()},
    ]  # fmt: skip
    made = (file, BPETokenizer(pieces), ByteTokenizer(), CharTokenizer("abc"), NumberTokenizer(9))
    return found + [{"state.json": json.dumps(each.state_dict()).encode()} for each in made]


def read_tokenizer(path: Path) -> None:
    from ravine.datamodules.tokenizer_factory import tokenizer_from_state_dict
    from ravine.datamodules.tokenizer_json import FileTokenizer

    state = path / "state.json"
    if state.is_file():
        try:
            said = json.loads(state.read_bytes())
        except (ValueError, RecursionError):
            return  # of a checkpoint, which another reader takes apart
        if not isinstance(said, dict):
            return
        tokenizer = tokenizer_from_state_dict(said)
    else:
        tokenizer = FileTokenizer.from_file(path)
    for text in ("abc", "7 8", "", "the 天地 the<|endoftext|>"):
        try:
            numbers = tokenizer.encode(text)
        except Exception as error:  # a character that it does not know
            if not _refused(error):
                raise
            continue
        tokenizer.decode(numbers)


def tokens_seeds() -> list[Files]:
    import numpy as np

    import ravine.datamodules  # noqa: F401

    numbers = np.arange(400) % 50
    files = {f"{name}.bin": numbers.astype(np.uint16).tobytes() for name in ("train", "val")}
    wide = {f"{name}.bin": numbers.astype(np.int32).tobytes() for name in ("train", "val")}
    letters = dict(enumerate(map(chr, range(48, 98))))
    meta = pickle.dumps(
        {"vocab_size": 50, "itos": letters, "stoi": {c: n for n, c in letters.items()}}
    )
    return [
        files | {"meta.pkl": meta},
        wide | {"meta.json": json.dumps({"vocab_size": 50, "dtype": "int32"}).encode()},
        files | {"meta.pkl": pickle.dumps({"vocab_size": 60, "dtype": "uint16"}, 0)},
    ]


def change_meta(dice: random.Random, files: Files) -> Files:
    """Change the meta file, as a stream or as values; the tokens stay."""
    from ravine.strategies.checkpoint import safe_pickle

    if "meta.json" in files:
        return change_json(dice, files)
    if dice.random() < 0.5:
        return files | {"meta.pkl": change_pickle(dice, files["meta.pkl"])}
    value = safe_pickle.load_plain(
        files["meta.pkl"], lambda name: False
    )  # it may have been changed
    value = change_value(dice, value, 0.2)
    return files | {"meta.pkl": pickle.dumps(value, dice.choice((0, 2, 4)))}


def change_tokens(dice: random.Random, files: Files) -> Files:
    """Change bytes of the tokens."""
    name = dice.choice(("train.bin", "val.bin"))
    return files | {name: change_bytes(dice, files[name])}


def read_tokens(path: Path) -> None:
    from ravine.datamodules import TextDataModule

    data = TextDataModule(path, context_length=8, batch_size=2)
    data.setup("fit")
    next(iter(data.train_dataloader()))
    list(data.val_dataloader())


def even_tokens(path: Path) -> bool:
    sizes = [(path / name).stat().st_size for name in ("train.bin", "val.bin")]
    return all(size and size % 2 == 0 for size in sizes)


def text_seeds() -> list[Files]:
    import ravine.cli.commands.generate
    import ravine.datamodules  # noqa: F401

    texts = ["a text of some length, " * 20, "Größe — 天地玄黄，宇宙洪荒。😀 " * 20]  # noqa: RUF001
    return [
        {"a.txt": text.encode(encoding)} for text in texts for encoding in ("utf-8", "utf-8-sig")
    ]


def change_text(dice: random.Random, files: Files) -> Files:
    """Insert odd characters, long runs and halves of special tokens; the encoding stays right."""
    text = files["a.txt"].decode()
    for _ in range(dice.choice((1, 2, 5))):
        at = dice.randrange(len(text) + 1)
        word = dice.choice(
            (
                " " * 200_000,
                "\u2028",
                "\x1c",
                "<|endoftext|>",
                "<|end",
                "\ufeff",
                "\n" * 120_000,
                "a" * 100_000,
                "\U0010ffff",
                "\r",
                "'s",
                "\u0301" * 999,
            )
        )
        text = text[:at] + word + text[at:]
    return files | {"a.txt": text.encode()}


def read_text(path: Path) -> None:
    from ravine.cli.commands import generate
    from ravine.datamodules import TextDataModule

    for kind in ("characters", "bytes"):
        data = TextDataModule(
            path, context_length=8, batch_size=2, tokenizer=kind, max_chars_in_memory=2**20
        )
        data.setup("fit")
        next(iter(data.train_dataloader()))
    generate.load_prompts(path, None)


def is_utf8(path: Path) -> bool:
    try:
        return bool(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        return False


def weights_seeds() -> list[Files]:
    from ravine.lightning_modules.nn import Transformer
    from ravine.lightning_modules.pretrained import gpt2

    torch.manual_seed(0)
    shape = gpt2.GPT2_KWARGS | {"num_layers": 1, "d_model": 8, "num_heads": 2}
    with tempfile.TemporaryDirectory() as folder:
        gpt2.save_hf(Transformer(20, 8, **shape), shape, folder, eos_id=0)
        return [{p.name: p.read_bytes() for p in sorted(Path(folder).iterdir(), reverse=True)}]


def change_header(dice: random.Random, files: Files) -> Files:
    """Change the table of a safetensors file; its length is made right again."""
    content = files["model.safetensors"]
    size = int.from_bytes(content[:8], "little")
    table = json.loads(content[8 : 8 + size])
    table = change_value(dice, table, 0.05)
    text = dumped(table)
    new = len(text).to_bytes(8, "little") + text + content[8 + size :]
    return files | {"model.safetensors": new}


def read_weights(path: Path) -> None:
    from ravine.lightning_modules.nn import Transformer
    from ravine.lightning_modules.pretrained import gpt2

    shape = gpt2.GPT2_KWARGS | {"num_layers": 1, "d_model": 8, "num_heads": 2}
    gpt2.load_hf(path, Transformer(20, 8, **shape))


def whole_weights(path: Path) -> bool:
    from safetensors.torch import load_file

    try:
        return bool(load_file(path / "model.safetensors")) and all_json(path)
    except Exception:
        return False


def config_seeds() -> list[Files]:
    texts = [
        "model: {class_path: LanguageModel, init_args: {layers: 1}}\ntrainer:\n  max_steps: 3\n",
        "a: &a [1, 2]\nb: &b {c: *a, d: *a}\ntrainer: {callbacks: [{class_path: EMA}]}\n",
    ]
    return [{"a.yaml": text.encode()} for text in texts]


def change_yaml(dice: random.Random, files: Files) -> Files:
    """Change a value, or add anchors, aliases and tags; what comes out is mostly YAML."""
    import yaml

    text = files["a.yaml"].decode()
    match dice.randrange(4 if len(text) < 2**14 else 3):  # PyYAML needs minutes for a megabyte
        case 0:
            depth, width = dice.choice((3, 5, 9, 40)), dice.choice((1, 2, 9))
            lines = ["x0: &x0 [1]"]
            lines += [f"x{n}: &x{n} [{', '.join([f'*x{n - 1}'] * width)}]" for n in range(1, depth)]
            text = "\n".join([*lines, text])
        case 1:
            tag = dice.choice(("!!python/object/apply:os.system", "!!binary", "!!set", "!!omap"))
            text += f"\nz: {tag} [{dice.choice(('touch canary', 'a', '1'))}]\n"
        case 2:
            text += f"\nz: {'[' * dice.choice((5, 90, 3000))}"
        case 3:
            value = change_value(dice, yaml.safe_load(text), 0.2)
            text = json_text(value, 2**19)
    return files | {"a.yaml": text.encode("utf-8", "surrogatepass")}


def read_config(path: Path) -> None:
    from ravine.cli.config import presets, trust, values

    presets.check_config_file(str(path))
    presets.check_config_order([str(path)])
    found = values.from_yaml(str(path))
    trust.find_dotted_names(found)
    for each in found:
        _ = each.children(), each.value, each.display_text


def is_text(path: Path) -> bool:
    try:
        return ":" in path.read_text("utf-8")
    except UnicodeDecodeError:
        return False


def idx_seeds() -> list[Files]:
    """Sets like MNIST: gzipped, plain, with labels from 1, in color."""
    import gzip

    import numpy

    numbers = numpy.random.RandomState(0)

    def idx(array: Any) -> bytes:
        head = bytes([0, 0, 8, array.ndim])
        sizes = b"".join(n.to_bytes(4, "big") for n in array.shape)
        return head + sizes + array.astype(numpy.uint8).tobytes()

    seeds = []
    for first, shape, is_gzipped in ((0, (5, 4), True), (1, (5, 4), False), (0, (3, 3, 3), True)):
        files = {}
        for side, count in (("train", 40), ("t10k", 20)):
            images = numbers.randint(0, 256, (count, *shape))
            arrays = {"images-idx3": images, "labels-idx1": first + numpy.arange(count) % 4}
            for name, array in arrays.items():
                content = idx(array)
                end = ".gz" if is_gzipped else ""
                files[f"{side}-{name}-ubyte{end}"] = (
                    gzip.compress(content) if is_gzipped else content
                )
        seeds.append(files)
    return seeds


def change_idx(dice: random.Random, files: Files) -> Files:
    """Change the head or the content of a file; a gzip is made right again."""
    import gzip

    name = dice.choice(list(files))
    is_gzipped = name.endswith(".gz")
    content = gzip.decompress(files[name]) if is_gzipped else files[name]
    match dice.randrange(5):
        case 0:
            place = 4 * dice.randrange(1, 5)
            number = dice.choice((*ODD, 10**9, 40, 39, 41, 5, 4)) % 2**32
            content = content[:place] + number.to_bytes(4, "big") + content[place + 4 :]
        case 1:
            content = content[:2] + bytes([dice.choice((8, 9, 11, 12, 13, 14, 200))]) + content[3:]
        case 2:
            content = content[:3] + bytes([dice.randrange(256)]) + content[4:]
        case 3:
            content = content[:16] + change_bytes(dice, content[16:])
        case 4:
            rank = dice.randrange(1, 5)
            size = dice.choice((10**6, 10**8, 2**31 - 1)) if dice.random() < 0.1 else 10**4
            sizes = [size] + [1] * (rank - 1)
            head = bytes([0, 0, 8, rank]) + b"".join(n.to_bytes(4, "big") for n in sizes)
            content = head + bytes(min(size, 10**8))
    return files | {name: gzip.compress(content, 1) if is_gzipped else content[: 10**7]}


def read_idx_folder(path: Path) -> None:
    from ravine.datamodules import ImageDataModule

    ImageDataModule(str(path), batch_size=4).setup("fit")


def whole_idx(path: Path) -> bool:
    """Whether each file is a whole gzip, or plain, and begins as an idx file does."""
    import gzip

    try:
        for file in path.iterdir():
            content = file.read_bytes()
            plain = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
            if plain[:2] != b"\0\0":
                return False
    except Exception:
        return False
    return True


def csv_seeds() -> list[Files]:
    """Common tables, and label<TAB>text."""
    rows = [(("ham", "spam")[i % 2], f'text {i}, or "more"; | of it') for i in range(12)]
    quoted = [(label, '"' + text.replace('"', '""') + '"') for label, text in rows]
    made = {
        "a.csv": "v1,v2,,,\r\n" + "".join(f"{a},{b},,,\r\n" for a, b in quoted),
        "b.csv": "id;text;category\n" + "".join(f"7;{b};{a}\n" for a, b in quoted),
        "c.csv": "".join(f"{a},{b}\n" for a, b in quoted),
        "d.tsv": "label\ttext\n" + "".join(f"{a}\t{b}\n" for a, b in quoted),
        "e.tsv": "".join(f"{a}\t{b}\n" for a, b in rows),
        "f.csv": "spam,message\n" + "".join(f"{int(a == 'spam')},{b}\n" for a, b in quoted),
    }
    return [{name: text.encode()} for name, text in made.items()]


def change_table(dice: random.Random, files: Files) -> Files:
    """Put other quotes, delimiters, line ends, labels and letters into a table."""
    (name, content), *_ = files.items()
    text = content.decode("utf-8", "replace")
    for _ in range(dice.choice((1, 1, 2, 6))):
        place, length = dice.randrange(len(text) + 1), dice.choice((0, 1, 1, 5, 60))
        piece = dice.choice(
            ('"', '""', ",", ";", "\t", "|", "\n", "\r", "\r\n", "\ufeff", "ham", "spam", "1", "",
             "\x0b", "\x85", "\u2028", "text", "label", "=1+1", "🎁", "\x1b[2J", " ", "x" * 2000,
             '"' * 99, "," * 3000, "\n" * 3000, text[place : place + 300])
        )  # fmt: skip
        text = text[:place] + piece + text[place + length :]
    return {name: text.encode("utf-8", "surrogatepass")}


def read_messages(path: Path) -> None:
    from ravine.datamodules import SpamDataModule
    from ravine.lightning_modules import SpamClassifier

    data = SpamDataModule(path, predict_path=path, batch_size="all", val_fraction=0.0)
    data.setup("fit")
    SpamClassifier(num_buckets=64).configure_from_data(data)
    next(iter(data.train_dataloader()))
    data.setup("predict")


def text_file(path: Path) -> bool:
    try:
        return "\0" not in path.read_bytes().decode()
    except UnicodeDecodeError:
        return False


TARGETS: dict[str, Target] = {
    "config": Target(config_seeds, read_config, [change_yaml], is_text),
    "checkpoint": Target(
        checkpoint_seeds, read_checkpoint, [change_record, change_tree], whole_archive
    ),
    "image": Target(image_seeds, read_image, [change_image, sometimes_large], known_image),
    "idx": Target(idx_seeds, read_idx_folder, [change_idx], whole_idx, folder=True),
    "csv": Target(csv_seeds, read_messages, [change_table], text_file),
    "folder": Target(
        sharded_seeds, read_checkpoint, [change_part, change_manifest], whole_folder, folder=True
    ),
    "jsonl": Target(rows_seeds, read_rows, [change_json], all_json),
    "tokenizer": Target(tokenizer_seeds, read_tokenizer, [change_json], all_json, folder=True),
    "tokens": Target(
        tokens_seeds, read_tokens, [change_meta, change_tokens], even_tokens, folder=True
    ),
    "text": Target(text_seeds, read_text, [change_text], is_utf8),
    "safetensors": Target(
        weights_seeds, read_weights, [change_header, change_json], whole_weights, folder=True
    ),
}


# ---- one input


@dataclass
class Outcome:
    """What became of an input."""

    passed: bool
    seconds: float
    grown: int  # bytes of resident memory, at the peak
    refused: bool
    faults: list[str] = field(default_factory=list)


class Watch:
    """An audit hook that notes what acts outside a folder while an input is read."""

    def __init__(self) -> None:
        self.folder, self.outside, self.events = "", "", []
        self.on, self.known = False, {name.partition(".")[0] for name in sys.modules}
        self.known |= set(sys.stdlib_module_names)
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event.startswith(ACTS):
            self.events.append(f"ran: {event} {str(arguments)[:200]}")
        elif event in CHANGES:
            paths = [a for a in arguments if isinstance(a, str | bytes | os.PathLike)]
            self.events += [f"touched: {event} {p!r}" for p in paths if not self.inside(p)]
        elif event == "open":
            path, mode, flags = arguments
            writes = bool((flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) or (
                isinstance(mode, str) and any(letter in mode for letter in "wax+")
            )
            if isinstance(path, str | bytes | os.PathLike):
                there = os.path.realpath(os.fsdecode(path))
                wrong = there.startswith(self.outside) or (writes and not self.inside(path))
                if wrong and there != os.devnull:
                    self.events.append(f"touched: open {there!r} {mode or flags}")
        elif event == "import" and arguments[0].partition(".")[0] not in self.known:
            self.events.append(f"ran: import {arguments[0]}")

    def inside(self, path: Any) -> bool:
        there = os.path.realpath(os.fsdecode(path))
        return there == self.folder or there.startswith(self.folder + os.sep)


def put(files: Files, folder: Path) -> None:
    for name, content in files.items():
        (folder / name).write_bytes(content)


def peak() -> int:
    """Peak of resident memory (bytes)."""
    with open("/proc/self/status") as file:
        line = next(each for each in file if each.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def reset_peak() -> None:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def try_input(target: Target, files: Files, sandbox: Path, watch: Watch) -> Outcome:
    """Read one input in a folder of its own."""
    folder = sandbox / "input.ckpt"
    folder.mkdir()
    try:
        put(files, folder)
        path = folder if target.folder else folder / next(iter(files))
        passed = target.passes(path)
        watch.folder, watch.events = os.path.realpath(folder), []
        watch.outside = os.path.realpath(sandbox / "canary")
        reset_peak()
        before, start_s, refused, faults = peak(), time.process_time(), False, []
        watch.on = True
        try:
            target.read(path)
        except Exception as error:
            watch.on = False
            refused = True
            if not _refused(error):
                where = traceback.extract_tb(error.__traceback__)[-1]
                text = " ".join(str(error).split())[:120]
                place = f"{Path(where.filename).name}:{where.lineno}"
                faults.append(f"raised: {type(error).__name__} at {place}: {text}")
        except BaseException as error:  # SystemExit out of a payload
            faults.append(f"ran: {type(error).__name__}")
        watch.on = False
        seconds, grown = time.process_time() - start_s, peak() - before
        faults += watch.events
        if seconds > HANG:
            faults.append(f"hung: {seconds:.1f} s")
        if grown > MEMORY + 4 * sum(map(len, files.values())):
            faults.append(f"grew: {grown / 2**20:.0f} MiB")
        return Outcome(passed, seconds, grown, refused, faults)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def mutated(target: Target, seeds: list[Files], dice: random.Random) -> Files:
    files = dice.choice(seeds)
    for _ in range(dice.choice((1, 1, 1, 2, 3))):
        mutator = dice.choice([*target.mutators * 4, any_bytes])
        with contextlib.suppress(Exception):  # one mutation may spoil what another needs
            files = mutator(dice, files)
    return files


# ---- the campaign


class Campaign:
    """Reads inputs until the time is over, and counts."""

    def __init__(self, name: str, seed: int, keep: Path | None) -> None:
        self.name, self.seed, self.keep = name, seed, keep
        self.target = TARGETS[name]
        self.counts: Counter[str] = Counter()
        self.worst_seconds, self.worst_bytes = 0.0, 0
        self.faults: Counter[str] = Counter()
        import ravine.cli.error_report
        import ravine.lightning_modules  # noqa: F401 - before the fork: it takes longer than an input

        self.seeds = self.target.seeds()

    def run(self, seconds: float, inputs: int | None = None) -> None:
        """Run children of BATCH inputs each, for so long, or so many inputs."""
        end, number = time.monotonic() + seconds, 0
        while time.monotonic() < end and (inputs is None or number < inputs):
            batch = BATCH if inputs is None else min(BATCH, inputs - number)
            number = self._batch(number, number + batch, end)

    def _batch(self, start: int, stop: int, end: float) -> int:
        """Read inputs from start to stop in a child process; return the number of the next one."""
        reader, writer = os.pipe()
        sys.stdout.flush()
        if not (child := os.fork()):
            os.close(reader)
            status = 1
            try:
                self._child(start, stop, writer)
                status = 0
            finally:
                os._exit(status)
        os.close(writer)
        number = start
        with os.fdopen(reader, "rb", buffering=0) as pipe:
            waiting = b""
            while True:
                ready, _, _ = select.select([pipe], [], [], PATIENCE)
                piece = pipe.read(2**16) if ready else b""
                if not ready:
                    self.note(number, [f"hung: more than {PATIENCE:.0f} s"])
                    os.kill(child, signal.SIGKILL)
                if not piece:
                    break
                *lines, waiting = (waiting + piece).split(b"\n")
                for line in lines:
                    self.count(number, json.loads(line))
                    number += 1
                if time.monotonic() > end:
                    os.kill(child, signal.SIGKILL)
                    os.waitpid(child, 0)
                    return number
        _, status = os.waitpid(child, 0)
        if status and number < stop:
            killed = f" by signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else ""
            if not killed.endswith(f" {signal.SIGKILL}"):
                self.note(number, [f"crashed{killed}"])
            number += 1
        return number

    def _child(self, start: int, stop: int, writer: int) -> None:
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        here = Path(tempfile.mkdtemp(prefix="fuzz-"))
        try:
            os.chdir(here)
            (here / "canary").mkdir()
            (here / "canary" / "passwd").write_text("secret")
            (here / "canary_module.py").write_text("raise SystemExit('the canary is dead')")
            sys.path.insert(0, str(here))
            os.environ["XDG_CACHE_HOME"] = str(
                here / "input.ckpt"
            )  # tokens of a long text are kept
            for files in self.seeds:  # what a good file imports is no fault
                for _ in range(2):
                    with contextlib.suppress(Exception):
                        folder = here / "good.ckpt"
                        folder.mkdir()
                        put(files, folder)
                        self.target.read(
                            folder if self.target.folder else folder / next(iter(files))
                        )
                    shutil.rmtree(folder)
            limit = 2 * MEMORY + 2**32 + int(Path("/proc/self/statm").read_text().split()[0]) * 4096
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            watch = Watch()
            with open(os.devnull, "w") as silent, contextlib.redirect_stdout(silent):
                os.dup2(silent.fileno(), 2)
                for number in range(start, stop):
                    files = self.input(number)
                    outcome = try_input(self.target, files, here, watch)
                    os.write(writer, json.dumps(vars(outcome)).encode() + b"\n")
        finally:
            os.chdir("/")
            shutil.rmtree(here, ignore_errors=True)

    def input(self, number: int) -> Files:
        """The input of a number: the seed and the number make it again."""
        return mutated(self.target, self.seeds, random.Random(f"{self.seed}/{self.name}/{number}"))

    def count(self, number: int, outcome: dict[str, Any]) -> None:
        self.counts["inputs"] += 1
        self.counts["passed_first_check"] += outcome["passed"]
        self.counts["refused"] += outcome["refused"]
        self.worst_seconds = max(self.worst_seconds, outcome["seconds"])
        self.worst_bytes = max(self.worst_bytes, outcome["grown"])
        self.note(number, outcome["faults"])

    def note(self, number: int, faults: list[str]) -> None:
        for fault in faults:
            self.counts[fault.partition(":")[0].split()[0]] += 1
            if not self.faults[fault]:
                print(f"{self.name} {number}: {fault}", flush=True)
                if self.keep:
                    folder = self.keep / f"{self.name}-{self.seed}-{number}"
                    folder.mkdir(parents=True, exist_ok=True)
                    put(self.input(number), folder)
            self.faults[fault] += 1

    def row(self) -> dict[str, Any]:
        """What is stored."""
        import lightning

        kinds = ("ran", "touched", "hung", "grew", "crashed", "raised")
        return {
            "reader": self.name,
            "seed": self.seed,
            **{key: self.counts[key] for key in ("inputs", "passed_first_check", "refused")},
            **{key: self.counts[key] for key in kinds},
            "worst_seconds": round(self.worst_seconds, 2),
            "worst_mib": round(self.worst_bytes / 2**20),
            "python": sys.version.split()[0],
            "lightning": lightning.__version__,
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--reader", action="append", choices=list(TARGETS), default=[])
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--inputs", type=int, help="so many inputs, and no row")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for the inputs that fail")
    parser.add_argument("--list", action="store_true", help="show the readers")
    options = parser.parse_args()
    if options.list:
        print("\n".join(TARGETS))
        return 0
    failed = False
    for name in options.reader or TARGETS:
        campaign = Campaign(name, options.seed, options.keep)
        start_s = time.monotonic()
        campaign.run(60 * options.minutes, options.inputs)
        row = campaign.row() | {"minutes": round((time.monotonic() - start_s) / 60, 2)}
        failed |= bool(campaign.faults)
        if options.inputs is None:
            from record import append, machine

            append("fuzz", row | machine())
        else:
            print(json.dumps(row))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
