"""Segments in real files, read by another process where it matters."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import run_config

from actors.ray_cluster import choose_transport
from actors.weight_transport import NUM_SEGMENTS, WeightExporter, WeightReader
from ocrm_ray.errors import RunError, StaleWeightsError

ROOT = Path(__file__).parents[2]
OTHER_PROCESS = """
import sys
from pathlib import Path
from safetensors.torch import save_file
from actors.weight_transport import WeightReader
from ocrm_ray.records import PolicyWeights
reader = WeightReader()
for line in sys.stdin:
    version, checksum, path, copy = line.split()
    with reader.read(PolicyWeights(int(version), Path(path), 0, int(checksum))) as tensors:
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, copy)
    print(len(reader._segments), flush=True)
"""


def weights_of(seed):
    """Tensors of several widths and odd sizes; the head is tied."""
    generator = torch.Generator().manual_seed(seed)
    embedding = torch.randn(7, 5, generator=generator).bfloat16()
    return {
        "mask": torch.rand(3, generator=generator) < 0.5,
        "model.embed_tokens.weight": embedding,
        "lm_head.weight": embedding,
        "model.norm.weight": torch.randn(9, generator=generator),
        "scale": torch.randn((), generator=generator).half(),
        "positions": torch.randint(99, (5,), generator=generator),
    }


def exporter_in(folder, checksum=False):
    return WeightExporter(folder, weights_of(0), checksum=checksum)


def assert_equal_tensors(tensors, expected):
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor), name


def test_another_process_reads_every_export_bit_for_bit_from_mappings_that_it_keeps(tmp_path):
    exporter, num_mapped = exporter_in(tmp_path / "segments", checksum=True), []
    with subprocess.Popen(
        [sys.executable, "-c", OTHER_PROCESS], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        for version in range(6):
            weights, copy = exporter.export(version, [weights_of(version)]), tmp_path / "copy"
            other.stdin.write(f"{version} {weights.checksum} {weights.path} {copy}\n")
            other.stdin.flush()
            num_mapped.append(int(other.stdout.readline()))
            assert_equal_tensors(load_file(copy), weights_of(version))
            exporter.release(weights)
        other.stdin.close()
    assert num_mapped[-1] <= NUM_SEGMENTS


def test_a_segment_is_an_ordinary_safetensors_file_with_the_tied_head_under_its_own_name(tmp_path):
    weights = exporter_in(tmp_path).export(3, [weights_of(3)])
    assert_equal_tensors(load_file(weights.path), weights_of(3))
    assert weights.num_bytes == weights.path.stat().st_size


def test_ten_publishes_use_the_same_two_files_while_each_is_read_during_the_next_export(tmp_path):
    exporter, reader, previous = exporter_in(tmp_path), WeightReader(), None
    inodes = {path: path.stat().st_ino for path in tmp_path.iterdir()}
    for version in range(10):
        weights = exporter.export(version, [weights_of(version)])
        if previous is not None:
            with reader.read(previous) as tensors:
                assert_equal_tensors(tensors, weights_of(version - 1))
            exporter.release(previous)
        previous = weights
    assert {path: path.stat().st_ino for path in tmp_path.iterdir()} == inodes
    assert len(inodes) == NUM_SEGMENTS


def test_held_versions_get_files_of_their_own_which_serve_again_after_their_release(tmp_path):
    exporter, reader = exporter_in(tmp_path), WeightReader()
    held = [exporter.export(version, [weights_of(version)]) for version in range(5)]
    assert len({weights.path for weights in held}) == 5
    for version, weights in enumerate(held):
        with reader.read(weights) as tensors:
            assert_equal_tensors(tensors, weights_of(version))
    for weights in (*held, held[0]):  # a second release has no effect
        exporter.release(weights)
    again = [exporter.export(version, [weights_of(version)]) for version in range(5, 10)]
    assert {weights.path for weights in again} == {weights.path for weights in held}


def test_a_version_that_is_exported_already_is_a_programming_error(tmp_path):
    exporter = exporter_in(tmp_path)
    exporter.export(1, [weights_of(1)])
    with pytest.raises(AssertionError, match="version 1"):
        exporter.export(1, [weights_of(1)])


def test_another_version_than_was_sent_is_refused(tmp_path):
    weights = exporter_in(tmp_path).export(4, [weights_of(4)])
    with (
        pytest.raises(StaleWeightsError, match="version 4 instead of version 3"),
        WeightReader().read(replace(weights, version=3)),
    ):
        pass


def test_a_half_written_segment_is_refused(tmp_path):
    exporter = exporter_in(tmp_path)
    weights = exporter.export(4, [weights_of(4)])
    exporter.release(weights)
    broken = weights_of(5) | {"scale": "what no tensor can be copied from"}
    with pytest.raises(TypeError):
        exporter.export(5, [broken])
    for version in (4, 5):
        with (
            pytest.raises(StaleWeightsError, match="half-written"),
            WeightReader().read(replace(weights, version=version)),
        ):
            pass


def test_a_segment_that_is_rewritten_while_it_is_read_is_found_at_the_end(tmp_path):
    exporter = exporter_in(tmp_path)
    weights = exporter.export(4, [weights_of(4)])

    def read_too_long():
        with WeightReader().read(weights):
            exporter.release(weights)
            exporter.export(5, [weights_of(5)])

    with pytest.raises(StaleWeightsError, match="version 5 instead of version 4"):
        read_too_long()


def test_a_flipped_bit_is_found_by_its_checksum_and_only_by_it(tmp_path):
    weights = exporter_in(tmp_path, checksum=True).export(4, [weights_of(4)])
    with weights.path.open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))
    with WeightReader().read(replace(weights, checksum=None)):
        pass
    with pytest.raises(StaleWeightsError, match="checksum"), WeightReader().read(weights):
        pass


def test_what_a_reader_writes_by_mistake_reaches_nobody(tmp_path):
    weights = exporter_in(tmp_path).export(4, [weights_of(4)])
    with WeightReader().read(weights) as tensors:
        tensors["model.norm.weight"].zero_()
    with WeightReader().read(weights) as tensors:
        assert_equal_tensors(tensors, weights_of(4))


def test_too_little_shared_memory_is_said_before_anything_is_mapped(tmp_path):
    with pytest.raises(RunError, match="no room for weights of 1073741824 MiB"):
        WeightExporter(tmp_path, {"a": torch.empty(2**48, device="meta")}, checksum=False)


@pytest.mark.parametrize(
    ("transport", "gpus", "num_nodes", "expected"),
    [
        ("auto", 0, 1, (False, False)),
        ("auto", 0, 2, (True, False)),
        ("auto", 1, 1, (False, True)),
        ("auto", 1, 3, (True, True)),
        ("auto", 0.5, 1, (False, False)),
        ("shared_memory", 1, 2, (False, False)),
        ("object_store", 1, 1, (True, False)),
        ("nccl", 1, 2, (True, True)),
    ],
)
def test_transport_follows_the_configuration_the_gpus_and_the_nodes(tmp_path, transport, gpus, num_nodes, expected):
    pools = {name: {"gpus_per_actor": gpus} for name in ("policy", "generation")}
    config = run_config(tmp_path, publish={"transport": transport}, pools=pools)
    assert choose_transport(config, num_nodes) == expected
