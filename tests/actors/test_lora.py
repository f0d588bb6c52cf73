"""Training adapters with real engines, against the formula of the paper on plain weights, and on several ranks."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_several_ranks import SPREAD, TABLE, assert_close, build_network, replayed, train
from tiny_models import EOS, run_config, save_policy
from torch.func import functional_call

from actors.engine_settings import EngineSettings
from actors.policy import PolicyActor
from actors.training_engine import TrainingEngine
from ocrm_ray.batches import SequenceTable
from ocrm_ray.config import Lora, Pool
from ocrm_ray.errors import RunError
from ocrm_ray.networks import ScalarModel, last_token_scores, load_causal_lm, table_logprobs
from ocrm_ray.records import Sequence

pytestmark = pytest.mark.real

LORA = Lora(rank=3, alpha=12)
SCALE = 4.0


def make_engine(stage=0, dtype="float32", lora=LORA):
    settings = EngineSettings(1e-2, 1e6, stage, dtype, max_skipped_steps=2, deepspeed=SPREAD, lora=lora)
    return TrainingEngine(ScalarModel(build_network()), settings)


def loss_of(forward, chunk):
    return (last_token_scores(forward, TABLE.batch(chunk)) - 1).square().sum() / len(TABLE)


def test_adapters_change_nothing_until_they_are_trained():
    plain, adapted = make_engine(lora=None), make_engine()
    expected, found = plain.weights(), adapted.weights()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert found.keys() == expected.keys()


def test_steps_are_those_of_the_papers_formula_on_plain_weights():
    """W + alpha / r * B A in place of every weight of the backbone's linear layers; the head is trained as it is."""
    engine, plain = make_engine(), make_engine(lora=None)
    start = engine.weights()
    parts = {name: tensor.detach().clone().requires_grad_() for name, tensor in engine._trained().items()}
    names = {name: name.replace(".lora_A.default", "") for name in parts if ".lora_A." in name}
    assert len(names) == 7 * plain.network.config.num_hidden_layers
    optimizer = torch.optim.AdamW(parts.values(), 1e-2, betas=(0.9, 0.999), weight_decay=0.0)

    def made():
        products = {
            plain_name: start[plain_name.removeprefix("network.")]
            + SCALE * parts[name.replace("lora_A", "lora_B")] @ parts[name]
            for name, plain_name in names.items()
        }
        return products | {name: tensor for name, tensor in parts.items() if "lora_" not in name}

    for _ in range(4):
        forward = lambda *inputs: functional_call(plain.module, made(), inputs)  # noqa: E731
        loss_of(forward, list(range(len(TABLE)))).backward()
        optimizer.step()
        optimizer.zero_grad()
    train(engine, 4)
    expected = start | {name.removeprefix("network."): tensor.detach() for name, tensor in made().items()}
    moved = [name for name, tensor in expected.items() if not torch.equal(tensor, start[name])]
    assert len(moved) == len(names) + 1
    assert_close(engine.weights(), expected, atol=2e-5)


def trained_weights(stage, dtype):
    engine = make_engine(stage, dtype)
    train(engine, 3)
    weights = engine.weights()
    engine.close()
    return weights


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_adapters_on_two_ranks_are_those_of_one(two_ranks, stage):
    expected = trained_weights(0, "float32")
    found, nothing = two_ranks.run(trained_weights, stage, "float32")
    assert nothing == {}
    assert_close(found, expected, atol=2e-5)


def resumed(stage, dtype):
    """The weights after four steps, and after two and two more of another engine that goes on from there."""
    first = make_engine(stage, dtype)
    train(first, 2)
    state = first.capture()
    train(first, 2)
    second = make_engine(stage, dtype)
    second.restore(state)
    train(second, 2)
    answer = first.weights(), second.weights()
    first.close()
    second.close()
    return answer


@pytest.mark.parametrize(("stage", "dtype"), [(0, "float32"), (0, "bfloat16"), (2, "float32"), (3, "bfloat16")])
def test_a_restored_engine_goes_on_bit_for_bit(stage, dtype):
    whole, cut = resumed(stage, dtype)
    assert all(torch.equal(cut[name], tensor) for name, tensor in whole.items())


def test_weights_that_were_moved_come_back_and_gradients_are_of_what_is_trained():
    engine = make_engine()
    train(engine, 1)
    before = engine.weights()
    gradients = engine.gradients([list(range(len(TABLE)))], lambda chunk: loss_of(engine.module, chunk))
    assert [each.shape for each in gradients] == [parameter.shape for parameter in engine._trained().values()]
    with engine.moved(gradients):
        inside = engine.weights()
    after = engine.weights()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert any(not torch.equal(inside[name], tensor) for name, tensor in before.items())


def test_a_policy_exports_what_it_says_and_keeps_all_but_the_layers_it_adapts(tmp_path):
    folder = save_policy(tmp_path / "sft")
    policy = {"learning_rate": 1e-2, "lora": {"rank": 2, "targets": ["q_proj", "v_proj"]}}
    config = run_config(tmp_path, policy=policy, rollout={"missing_eos": "mask"})
    actor = PolicyActor(config, folder, None, config.run_dir, tmp_path / "exports")
    actor.start()
    for rollouts in replayed():
        actor.update(rollouts)
    weights, start = load_file(actor.export_weights().path), load_file(tmp_path / "sft" / "model.safetensors")
    changed = {name for name, tensor in start.items() if not torch.equal(weights[name], tensor)}
    assert changed == {name for name in start if "q_proj" in name or "v_proj" in name}
    sequences = [Sequence((5, 6), (8, 9, EOS), True), Sequence((5, 7), (11, 12, 13), False)]
    actor.save("policy")
    model = load_causal_lm(str(config.run_dir / "policy"), dtype="float32", trust_remote_code=False)
    told = table_logprobs(model, SequenceTable(sequences, EOS, share_prompts=False), 1.0, Pool())
    for row, other in zip(actor.logprobs(sequences), told, strict=True):
        np.testing.assert_allclose(row, other, atol=1e-5)


def test_targets_that_no_layer_has_are_an_error():
    with pytest.raises(RunError, match=r"lora.targets \['q_prj'\]"):
        make_engine(lora=Lora(targets=("q_prj",)))
