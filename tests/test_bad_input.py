"""Bad input and disk faults through the whole program: exact message, exit status, nothing that is trusted later."""

import errno
import gzip
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pyarrow
import pyarrow.parquet
import pytest
from disk_faults import full_after
from offline_stages import run_stages
from safetensors import SafetensorError

from ocrm_ray import praise, stages
from ocrm_ray.cli import main
from ocrm_ray.config import DataFile, PraiseWorld
from ocrm_ray.config_file import anchored, load_run_config
from ocrm_ray.data_files import Row, read_rows

RUN = """
name: trial
data: {prompts: {path: prompts.jsonl}, num_heldout: 10, max_prompt_tokens: 64}
sft: {ready: model}
reward: {ready: rm, num_calibration: 8}
gold: {kind: function, path: 'ocrm_ray.praise:gold'}
pairs: {num_pairs: 40}
rollout: {prompts_per_step: 2, max_new_tokens: 13}
evaluation: {num_prompts: 10, num_pair_prompts: 4, num_samples_saved: 4}
"""
PAIRS = ("pairs.ready.path=pairs.jsonl",)
Prepare = Callable[[Path], object]
Expected = dict[tuple[str, ...], dict[str, bytes]]
NUM_ROWS = 60


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sound inputs: the world's prompts and models, and pairs made from the prompts."""
    folder = tmp_path_factory.mktemp("sound")
    praise.write_world(folder, PraiseWorld(num_prompts=NUM_ROWS), seed=5)
    (folder / "policy").rename(folder / "model")
    (folder / "reward").rename(folder / "rm")
    (folder / "run.yaml").write_text(RUN)
    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    pairs = [{"prompt": row["prompt"], "chosen": row["reference"], "rejected": "the old river"} for row in rows]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return folder


@pytest.fixture
def workplace(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory with the sound inputs; ``ocrm-ray run`` there makes the stages, without Ray."""
    shutil.copytree(sound, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_ADDRESS", "cluster:6379")
    monkeypatch.setattr(sys, "argv", ["ocrm-ray"])
    launcher = ModuleType("actors.launcher")
    launcher.run = lambda config, resume: run_stages(config) and ""  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "actors.launcher", launcher)
    return tmp_path


def lines_of(name: str = "prompts.jsonl") -> list[bytes]:
    return Path(name).read_bytes().splitlines()


def with_line(text: bytes, at: int, name: str = "prompts.jsonl") -> Prepare:
    """A file whose line number ``at`` is another."""

    def prepare(folder: Path) -> None:
        lines = lines_of(name)
        lines[at - 1] = text
        (folder / name).write_bytes(b"\n".join(lines) + b"\n")

    return prepare


def all_lines(text: bytes, name: str = "prompts.jsonl") -> Prepare:
    return lambda folder: (folder / name).write_bytes((text + b"\n") * NUM_ROWS)


def content(change: Callable[[bytes], bytes], name: str) -> Prepare:
    """A file made from the bytes of the sound prompts."""
    return lambda folder: (folder / name).write_bytes(change((folder / "prompts.jsonl").read_bytes()))


def parquet(jsonl: bytes, convert: Callable[[str], object] = str) -> bytes:
    rows = [{"prompt": convert(json.loads(line)["prompt"])} for line in jsonl.splitlines()]
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


def in_model(name: str, text: str) -> Prepare:
    return lambda folder: (folder / "model" / name).write_text(text)


def torn(name: str) -> Prepare:
    """A file of the model that ends in its middle."""
    return lambda folder: os.truncate(folder / "model" / name, (folder / "model" / name).stat().st_size // 2)


def without_eos(folder: Path) -> None:
    path = folder / "model" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token": None}))


def only_pickled(folder: Path) -> None:
    (folder / "model" / "model.safetensors").rename(folder / "model" / "pytorch_model.bin")


def without_a_shard(folder: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002.safetensors"}}
    (folder / "model" / "model.safetensors.index.json").write_text(json.dumps(index))


P, Q = "data.prompts.path: got", "pairs.ready.path: got"
READABLE = ", need a readable JSON, JSONL or Parquet file: repair the file"
ROWS = ", need rows with a prompt, an instruction or messages: correct or drop them"
PAIR_ROWS = ", need rows with a prompt, a chosen and a rejected response: correct or drop them"
WHOLE = (
    " with a broken config.json, tokenizer.json or index, need whole files of transformers: download or save it again"
)
WEIGHTS = ", need whole safetensors files (pickles can run code): save it again (save_pretrained)"
FILE = ", need a file ending in .json, .jsonl, .ndjson or .parquet (or these with .gz): convert it, or name one file"
GZ, PARQUET = ("data.prompts.path=p.jsonl.gz",), ("data.prompts.path=p.parquet",)
SKIP = ("data.prompts.on_bad_row=skip",)

MISTAKES: dict[str, tuple[Prepare, tuple[str, ...], str]] = {
    "a line without its end": (
        with_line(b'{"prompt": "a"', 2),
        (),
        f"{P} 'prompts.jsonl', broken at line 2: Expecting ',' delimiter{READABLE}",
    ),
    "a broken line behind those that are checked first": (
        with_line(b"{", 50),
        (),
        (f"{P} 'prompts.jsonl', broken at line 50: Expecting property name enclosed in double quotes{READABLE}"),
    ),
    "a line that is no object": (
        with_line(b'"text"', 50),
        (),
        f"{P} 'prompts.jsonl', broken at line 50: not an object{READABLE}",
    ),
    "a line of Latin-1": (
        with_line(b'{"prompt": "caf\xe9"}', 50),
        (),
        f"{P} 'prompts.jsonl', broken at line 50: not UTF-8{READABLE}",
    ),
    "a file of UTF-16": (
        content(lambda text: text.decode().encode("utf-16"), "prompts.jsonl"),
        (),
        f"{P} 'prompts.jsonl', broken at line 1: not UTF-8{READABLE}",
    ),
    "a tail of zeros, as after a power cut": (
        content(lambda text: text + bytes(64), "prompts.jsonl"),
        (),
        f"{P} 'prompts.jsonl', broken at line 61: Expecting value{READABLE}",
    ),
    "a null byte in a string": (
        with_line(b'{"prompt": "a\0b"}', 50),
        (),
        f"{P} 'prompts.jsonl', broken at line 50: Invalid control character at{READABLE}",
    ),
    "a line nested too deep": (
        with_line(b'{"prompt": ' + b"[" * 100_000, 50),
        (),
        f"{P} 'prompts.jsonl', broken at line 50: nested too deep{READABLE}",
    ),
    "a number of too many digits": (
        with_line(b'{"prompt": "a", "n": ' + b"9" * 5000 + b"}", 50),
        (),
        f"{P} 'prompts.jsonl', broken at line 50: a number of too many digits{READABLE}",
    ),
    "half a character in a prompt": (
        with_line(b'{"prompt": "a \\ud800"}', 50),
        (),
        f"{P} row 50: '\\ud800' is half a character{ROWS}",
    ),
    "half a character in a reference": (
        with_line(b'{"prompt": "a", "output": "\\udfff"}', 50),
        (),
        f"{P} row 50: '\\udfff' is half a character{ROWS}",
    ),
    "a prompt that is a number": (
        with_line(b'{"prompt": 7}', 50),
        (),
        f"{P} row 50: prompt is int, not a string{ROWS}",
    ),
    "a role that is a list": (
        with_line(b'{"messages": [{"role": ["user"], "content": "a"}]}', 50),
        (),
        f"{P} row 50: a message has the role ['user']{ROWS}",
    ),
    "no messages": (with_line(b'{"messages": []}', 50), (), f"{P} row 50: the list of messages is empty{ROWS}"),
    "a file that is no gzip": (
        content(bytes, "p.jsonl.gz"),
        GZ,
        f"{P} 'p.jsonl.gz' (Not a gzipped file (b'{{\"')){READABLE}",
    ),
    "a gzip that ends early": (
        content(lambda text: gzip.compress(text)[:-20], "p.jsonl.gz"),
        GZ,
        f"{P} 'p.jsonl.gz' (Compressed file ended before the end-of-stream marker was reached){READABLE}",
    ),
    "a gzip with another checksum": (
        content(lambda text: gzip.compress(text)[:-8] + bytes(8), "p.jsonl.gz"),
        GZ,
        f"{P} 'p.jsonl.gz' (CRC check failed 0x0 != 0x508a49df){READABLE}",
    ),
    "a Parquet file that ends early": (
        content(lambda text: parquet(text)[:-20], "p.parquet"),
        PARQUET,
        (
            f"{P} 'p.parquet' (Parquet magic bytes not found in footer. Either the file is corrupted or this "
            f"is not a parquet file.){READABLE}"
        ),
    ),
    "a Parquet file with a broken page": (
        content(lambda text: parquet(text)[:30] + b"\xff" * 30 + parquet(text)[60:], "p.parquet"),
        PARQUET,
        f"{P} 'p.parquet' (Invalid BYTE_ARRAY value){READABLE}",
    ),
    "a Parquet column of bytes": (
        content(lambda text: parquet(text, str.encode), "p.parquet"),
        PARQUET,
        f"{P} row 1: prompt is bytes, not a string (and 31 more rows){ROWS}",
    ),
    "an empty file": (
        content(lambda text: b"", "prompts.jsonl"),
        (),
        f"{P} 'prompts.jsonl', which has no rows, need at least one row: name a data set with rows",
    ),
    "a folder": (
        lambda folder: (folder / "d.jsonl").mkdir(),
        ("data.prompts.path=d.jsonl",),
        f"{P} 'd.jsonl', a folder{FILE}",
    ),
    "a missing file": (
        lambda folder: None,
        ("data.prompts.path=gone.jsonl",),
        (
            f"{P} 'gone.jsonl', which does not exist, need a JSON, JSONL or Parquet file or a Hub data set: "
            "correct the path"
        ),
    ),
    "a file of another kind": (
        content(bytes, "prompts.csv"),
        ("data.prompts.path=prompts.csv",),
        f"{P} 'prompts.csv', a file of another kind{FILE}",
    ),
    "a file whose name is too long": (
        lambda folder: None,
        (f"data.prompts.path={'a' * 300}.jsonl",),
        (
            f"{P} '{'a' * 300}.jsonl', which does not exist, need a JSON, JSONL or Parquet file or a Hub data "
            "set: correct the path"
        ),
    ),
    "other columns, one with a line break in its name": (
        all_lines(b'{"a\\nb": 1, "c": 2}'),
        (),
        f"{P} columns a\\nb, c, need a column prompt, instruction or messages: rename the columns",
    ),
    "prompts that are all too long": (
        lambda folder: None,
        ("data.max_prompt_tokens=3",),
        (
            "data.max_prompt_tokens: got no prompt of at most 3 tokens (60 longer, 0 empty), need at least "
            "one: raise it, or use other prompts"
        ),
    ),
    "prompts that are all blank": (
        all_lines(b'{"prompt": " "}'),
        (),
        (
            "data.max_prompt_tokens: got no prompt of at most 64 tokens (0 longer, 60 empty), need at least "
            "one: raise it, or use other prompts"
        ),
    ),
    "prompts that are all the same": (
        all_lines(b'{"prompt": "river"}'),
        (),
        (
            "data.num_heldout: got 10 with 1 different prompts, need fewer than there are prompts: lower it, "
            "or add prompts"
        ),
    ),
    "only broken lines, skipped": (
        all_lines(b"{"),
        SKIP,
        (
            f"{P} 'prompts.jsonl', which has no rows (60 bad ones, the first broken at line 1: Expecting "
            "property name enclosed in double quotes), need at least one row: name a data set with rows"
        ),
    ),
    "only bad rows, skipped": (
        all_lines(b'{"prompt": 7}'),
        SKIP,
        f"{P} row 1: prompt is int, not a string (and 31 more rows){ROWS}",
    ),
    "a list that is broken, where lines may be": (
        content(lambda text: b'[{"prompt": "a"},', "prompts.jsonl"),
        SKIP,
        f"{P} 'prompts.jsonl', broken at line 1: Expecting value{READABLE}",
    ),
    "a broken line of pairs": (
        with_line(b"{", 50, "pairs.jsonl"),
        PAIRS,
        (f"{Q} 'pairs.jsonl', broken at line 50: Expecting property name enclosed in double quotes{READABLE}"),
    ),
    "a pair without prompt": (
        with_line(b'{"chosen": "a", "rejected": "b"}', 50, "pairs.jsonl"),
        PAIRS,
        (f"{Q} row 50: there is no prompt, and chosen and rejected share no beginning up to 'Assistant:'{PAIR_ROWS}"),
    ),
    "a pair with half a character": (
        with_line(b'{"prompt": "a", "chosen": "\\ud800", "rejected": "b"}', 50, "pairs.jsonl"),
        PAIRS,
        f"{Q} row 50: '\\ud800' is half a character{PAIR_ROWS}",
    ),
    "pairs of equal responses": (
        all_lines(b'{"prompt": "a", "chosen": "b", "rejected": "b"}', "pairs.jsonl"),
        PAIRS,
        (
            f"{Q} no usable pair in 60 rows (0 too long, 0 empty, 60 identical), need at least one pair: "
            "raise data.max_prompt_tokens, or use other pairs"
        ),
    ),
    "pairs with a blank response": (
        all_lines(b'{"prompt": "river", "chosen": "old", "rejected": " "}', "pairs.jsonl"),
        PAIRS,
        (
            f"{Q} no usable pair in 60 rows (0 too long, 60 empty, 0 identical), need at least one pair: "
            "raise data.max_prompt_tokens, or use other pairs"
        ),
    ),
    "a single pair": (
        lambda folder: (folder / "pairs.jsonl").write_bytes(lines_of("pairs.jsonl")[0]),
        PAIRS,
        "pairs.heldout_share: got 1 pair, need at least 2 pairs, to hold some out: add pairs",
    ),
    "pairs without a column": (
        all_lines(b'{"prompt": "a", "chosen": "b"}', "pairs.jsonl"),
        PAIRS,
        (
            f"{Q} columns prompt, chosen, need columns chosen and rejected, with prompt, messages or a shared "
            "beginning: rename the columns"
        ),
    ),
    "a missing model": (
        lambda folder: shutil.rmtree(folder / "model"),
        (),
        (
            'sft.ready: got "model", no folder with a config.json, need a model folder or a Hub name '
            "org/name: correct the path"
        ),
    ),
    "a shard that is named but not there": (
        without_a_shard,
        (),
        f'sft.ready: got "model" with model-00002.safetensors missing or incomplete{WEIGHTS}',
    ),
    "weights that end early": (
        torn("model.safetensors"),
        (),
        f'sft.ready: got "model" with model.safetensors missing or incomplete{WEIGHTS}',
    ),
    "pickled weights": (only_pickled, (), f'sft.ready: got "model" with no safetensors weights{WEIGHTS}'),
    "an index that ends early": (
        in_model("model.safetensors.index.json", '{"weight_map": {'),
        (),
        f'sft.ready: got "model"{WHOLE}',
    ),
    "a model's configuration that ends early": (torn("config.json"), (), f'sft.ready: got "model"{WHOLE}'),
    "a model's configuration of wrong types": (
        in_model("config.json", '{"architectures": 5}'),
        (),
        f'sft.ready: got "model"{WHOLE}',
    ),
    "a tokenizer that ends early": (torn("tokenizer.json"), (), f'sft.ready: got "model"{WHOLE}'),
    "a model without tokenizer": (
        lambda folder: (folder / "model" / "tokenizer.json").unlink(),
        (),
        'sft.ready: got "model" with no tokenizer, need its files beside the weights: save it there',
    ),
    "a tokenizer without EOS": (
        without_eos,
        (),
        (
            "sft: got 'model', whose tokenizer has no EOS token, need one that has: set eos_token in its "
            "tokenizer_config.json"
        ),
    ),
    "a null byte in a folder's name": (
        lambda folder: None,
        ('output_dir="a\\0b"',),
        'output_dir: got "a\\u0000b", need a folder that can be written (. is none): change it',
    ),
    "a run's name that is too long": (
        lambda folder: None,
        (f"name={'a' * 129}",),
        ('name: got "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa..., need 128 letters at most: change it'),
    ),
    "a seed that no generator takes": (
        lambda folder: None,
        (f"seed={2**31}",),
        "seed: got 2147483648, need a number less than 2147483648: change it",
    ),
    "a key of too many parts": (
        lambda folder: None,
        (".".join("a" * 5000) + "=1",),
        (
            '"a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a....: got a key of 5000 parts, need at '
            "most 21: correct the key"
        ),
    ),
    "a key that is no text": (
        lambda folder: None,
        ("\udcff=1",),
        "\\udcff=1: got no override, need key=value, such as policy.gamma=0.5: write both",
    ),
    "values nested too deep": (
        lambda folder: (folder / "run.yaml").write_text("name: x\nworld: " + "{a: " * 250 + "}" * 250),
        (),
        "the configuration: got one nested too deep, need mappings as the keys are: write it flatter",
    ),
    "a file where the run folder should be": (
        lambda folder: (folder / "runs").write_text(""),
        (),
        'output_dir: got "runs", need a folder that can be written (runs is none): change it',
    ),
}


def results(folder: Path) -> dict[str, bytes]:
    """What the stages left, by file; markers hold times of model files."""
    root = folder / "runs" / "trial" / "stages"
    return {str(path.relative_to(root)): path.read_bytes() for path in root.glob("*/*") if path.name != "stage.json"}


@pytest.fixture(scope="module")
def expected(sound: Path) -> Expected:
    """Results of undisturbed runs, with sampled and with ready pairs."""
    found = {}
    for overrides in ((), PAIRS):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(sound)
            run_stages(anchored(load_run_config(Path("run.yaml"), overrides), sound))
        found[overrides] = results(sound)
        shutil.rmtree(sound / "runs")
    assert "pairs/train.jsonl" in found[()]
    assert found[()] != found[PAIRS]
    return found


def repair(workplace: Path, sound: Path) -> None:
    if (workplace / "runs").is_file():
        (workplace / "runs").unlink()
    shutil.rmtree(workplace / "model", ignore_errors=True)
    shutil.copytree(sound, workplace, dirs_exist_ok=True)


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_with_status_2_and_its_repair_gives_the_results_of_an_undisturbed_run(
    name: str, workplace: Path, sound: Path, expected: Expected, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare, overrides, message = MISTAKES[name]
    prepare(workplace)
    assert main(["run", "run.yaml", *overrides]) == 2
    assert told(capsys, workplace) == [message]
    repair(workplace, sound)
    pairs = PAIRS if overrides == PAIRS else ()
    assert main(["run", "run.yaml", *pairs]) == 0
    assert results(workplace) == expected[pairs]


def told(capsys: pytest.CaptureFixture[str], workplace: Path) -> list[str]:
    """Lines on stderr, paths from the current directory; progress bars of libraries left out."""
    lines = capsys.readouterr().err.replace(f"{workplace}/", "").splitlines()
    return [line for line in lines if "Writing model shards" not in line]


STAGES = "runs/trial/stages"
CLOSING = ["run folder: runs/trial", "events: runs/trial/events.jsonl", "resume: ocrm-ray run run.yaml --resume"]


def failing(number: int, path: str | None = None) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number), *([path] if path else []))

    return fail


def fail_to_save(*_: object) -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def change_after_reading(patch: pytest.MonkeyPatch) -> None:
    def read_and_change(source: DataFile, *arguments: object, **options: object) -> list[Row]:
        rows = read_rows(source, *arguments, **options)  # type: ignore[arg-type]
        with Path(source.path).open("a") as file:
            file.write('{"prompt": "one more"}\n')
        return rows

    patch.setattr(stages, "read_rows", read_and_change)


def in_the_way(path: str) -> Callable[[pytest.MonkeyPatch], None]:
    """A file where a stage needs a folder."""

    def put(_: pytest.MonkeyPatch) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text("")

    return put


FAULTS: dict[str, tuple[Callable[[pytest.MonkeyPatch], object], str]] = {
    "a full disk": (lambda patch: patch.setattr(os, "fsync", failing(errno.ENOSPC)), "no space left on device"),
    "a used-up quota": (lambda patch: patch.setattr(os, "fsync", failing(errno.EDQUOT)), "disk quota exceeded"),
    "a disk that fails": (lambda patch: patch.setattr(os, "fsync", failing(errno.EIO)), "input/output error"),
    "a full disk under weights": (
        lambda patch: patch.setattr("safetensors.numpy.save_file", fail_to_save), "no space left on device"),
    "a folder that became read-only": (
        lambda patch: patch.setattr(Path, "mkdir", failing(errno.EROFS, "runs/trial")),
        "read-only file system: 'runs/trial'"),
    "a folder of another user": (
        lambda patch: patch.setattr(Path, "mkdir", failing(errno.EACCES, "runs/trial")),
        "permission denied: 'runs/trial'"),
    "a share that went away": (
        lambda patch: patch.setattr(os, "replace", failing(errno.ESTALE, "a")), "stale file handle: 'a'"),
    "a file that is too large for its file system": (
        lambda patch: patch.setattr(os, "fsync", failing(errno.EFBIG)), "file too large"),
    "a file where a stage's folder should be": (
        in_the_way(f"{STAGES}/data"), f"not a directory: '{STAGES}/data/stage.json'"),
    "a file where the folder of stages should be": (in_the_way(STAGES), f"not a directory: '{STAGES}/data'"),
    "prompts that change while they are read": (
        change_after_reading, "prompts.jsonl changed while it was read: run again"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_told_without_traceback_with_status_1_and_a_run_after_it_trusts_nothing_of_it(
    name: str, workplace: Path, sound: Path, expected: Expected, capsys: pytest.CaptureFixture[str]
) -> None:
    plant, cause = FAULTS[name]
    with pytest.MonkeyPatch.context() as patch:
        plant(patch)
        assert main(["run", "run.yaml"]) == 1
    lines = [line for line in told(capsys, workplace) if not line.startswith("logs of the processes: ")]
    assert lines == [f"error: {cause}", *CLOSING]
    for path in (workplace / STAGES, workplace / STAGES / "data"):
        if path.is_file():
            path.unlink()
    repair(workplace, sound)
    assert main(["run", "run.yaml"]) == 0
    assert results(workplace) == expected[()]


def run_on_a_disk_for(num_files: int) -> int:
    """Its exit status."""
    with full_after(num_files):
        return main(["run", "run.yaml"])


def test_wherever_the_disk_is_full_the_next_run_has_the_results_of_an_undisturbed_one(
    workplace: Path, expected: Expected
) -> None:
    num_ended = 0
    while run_on_a_disk_for(num_ended) == 1:
        assert main(["run", "run.yaml"]) == 0
        assert results(workplace) == expected[()]
        shutil.rmtree(workplace / "runs")
        num_ended += 1
    assert num_ended > 10


LIMITED = """
import sys
from types import ModuleType
from disk_faults import files_up_to
from offline_stages import run_stages
from ocrm_ray.cli import main
launcher = ModuleType("actors.launcher")
launcher.run = lambda config, resume: run_stages(config)
sys.modules["actors.launcher"] = launcher
with files_up_to(3000):
    sys.exit(main(["run", "run.yaml"]))
"""


def test_a_write_that_the_system_really_refuses_is_told_and_leaves_nothing(workplace: Path, expected: Expected) -> None:
    done = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[0] == "error: file too large"
    assert "Traceback" not in done.stderr
    assert results(workplace) == {}
    assert main(["run", "run.yaml"]) == 0
    assert results(workplace) == expected[()]


def test_bad_rows_are_skipped_counted_and_told_where_that_is_set(workplace: Path, expected: Expected) -> None:
    lines = lines_of()
    bad = [b'{"prompt": "a"', b'{"prompt": 7}', b'{"prompt": "\\ud800"}']
    (workplace / "prompts.jsonl").write_bytes(b"\n".join([lines[0], *bad, *lines[1:]]))
    assert main(["run", "run.yaml", *SKIP]) == 0
    assert results(workplace) == expected[()]
    marker = json.loads((workplace / STAGES / "data" / "stage.json").read_text())
    assert (marker["num_rows"], marker["num_bad"], marker["num_kept"]) == (NUM_ROWS + 2, 3, NUM_ROWS)
    assert marker["bad_rows"] == [
        "broken at line 2: Expecting ',' delimiter",
        "row 2: prompt is int, not a string",
        "row 3: '\\ud800' is half a character",
    ]


def test_bad_pairs_are_skipped_and_counted_where_that_is_set(workplace: Path) -> None:
    with (workplace / "pairs.jsonl").open("ab") as file:
        file.write(b'{\n{"prompt": "river", "chosen": 3, "rejected": "a"}\n')
    assert main(["run", "run.yaml", *PAIRS, "pairs.ready.on_bad_row=skip"]) == 0
    marker = json.loads((workplace / STAGES / "pairs" / "stage.json").read_text())
    assert (marker["num_bad"], marker["num_kept"]) == (2, NUM_ROWS)
    assert marker["bad_rows"][1] == "row 61: chosen is int and rejected is str"


@pytest.mark.parametrize("damage", ["missing", "shorter"])
def test_a_file_that_a_stage_lost_later_is_made_again(damage: str, workplace: Path, expected: Expected) -> None:
    assert main(["run", "run.yaml"]) == 0
    path = workplace / STAGES / "pairs" / "train.jsonl"
    path.unlink() if damage == "missing" else os.truncate(path, 100)
    assert main(["run", "run.yaml", "--resume"]) == 0
    assert results(workplace) == expected[()]


@pytest.mark.parametrize("text", ["", "{", "[1]", '"text"', "\xff"])
def test_a_stage_whose_marker_is_broken_is_made_again(text: str, workplace: Path, expected: Expected) -> None:
    assert main(["run", "run.yaml"]) == 0
    (workplace / STAGES / "data" / "stage.json").write_text(text, encoding="latin-1")
    (workplace / STAGES / "data" / "prompts.jsonl").write_text("")
    assert main(["run", "run.yaml", "--resume"]) == 0
    assert results(workplace) == expected[()]


def test_pairs_that_changed_under_a_cached_stage_are_read_again(workplace: Path, expected: Expected) -> None:
    rows = (workplace / "pairs.jsonl").read_text()
    (workplace / "pairs.jsonl").write_text(rows.replace("the old river", "a quiet lamp"))
    assert main(["run", "run.yaml", *PAIRS]) == 0
    assert results(workplace)["pairs/train.jsonl"] != expected[PAIRS]["pairs/train.jsonl"]
    (workplace / "pairs.jsonl").write_text(rows)
    assert main(["run", "run.yaml", *PAIRS]) == 0
    assert results(workplace) == expected[PAIRS]


@pytest.mark.parametrize(
    ("number", "cause"), [(errno.ENOSPC, "no space left on device"), (None, "permission denied: 'a'")]
)
def test_a_report_that_cannot_be_written_is_told_with_status_1_and_the_old_one_stays(
    number: int | None, cause: str, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = workplace / "done"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 0, "time_s": 1.0}\n')
    (folder / "report.html").write_text("old")
    monkeypatch.setattr("ocrm_ray.report.draw_run", lambda run: {})
    monkeypatch.setattr("ocrm_ray.report.render_report", lambda run, pictures: "new")
    monkeypatch.setattr(os, "fsync", failing(number) if number else failing(errno.EACCES, "a"))
    assert main(["report", "done"]) == 1
    assert capsys.readouterr() == ("", f"error: {cause}\n")
    assert sorted(path.name for path in folder.iterdir()) == ["metrics.jsonl", "report.html"]
    assert (folder / "report.html").read_text() == "old"
