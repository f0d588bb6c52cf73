"""What a correction asks of an engine beside training: weights moved for a while, plain gradients, second moments."""

import math

import psutil
import pytest
import torch
from fakes import tiny_run
from tiny_models import EOS, llama_config, pad_batch, random_pairs

from actors.training_engine import EngineSettings, TrainingEngine, start_process
from ocrm_ray.errors import RunError
from ocrm_ray.networks import ScalarModel, last_token_scores

pytestmark = pytest.mark.real

BATCH = pad_batch([pair.chosen for pair in random_pairs(12, seed=1)], EOS)
OTHER = pad_batch([pair.rejected for pair in random_pairs(9, seed=2)], EOS)
PLAIN, ZERO_1, BFLOAT16 = (0, "float32"), (1, "float32"), (0, "bfloat16")
BETA2 = 0.95


def build_network():
    from transformers import LlamaForSequenceClassification

    torch.manual_seed(4)
    config = llama_config(num_labels=1, num_hidden_layers=1, initializer_range=0.1, pad_token_id=EOS)
    return LlamaForSequenceClassification(config).eval()


@pytest.fixture
def make_engine():
    engines = []

    def make(zero_stage, dtype, weights=None, max_skipped_steps=0):
        decay = 0.0 if max_skipped_steps == 0 else 0.1
        settings = EngineSettings(1e-2, 1e6, zero_stage, dtype, decay, BETA2, max_skipped_steps=max_skipped_steps)
        network = build_network()
        if weights is not None:
            network.load_state_dict(weights)
        engines.append(TrainingEngine(ScalarModel(network), settings))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def weights_of(engine):
    return [parameter.detach().clone() for parameter in engine.module.parameters()]


def mean_square(model, batch):
    return last_token_scores(model, batch).square().mean()


def train(engine, num_steps):
    for _ in range(num_steps):
        engine.accumulate([BATCH], lambda batch: mean_square(engine.forward, batch))
        engine.step(1.0)


class Planted(Exception):
    pass


@pytest.mark.parametrize(("zero_stage", "dtype"), [PLAIN, ZERO_1, BFLOAT16])
def test_moved_weights_come_back_to_the_last_bit_also_when_the_body_raises(make_engine, zero_stage, dtype):
    engine = make_engine(zero_stage, dtype)
    before = weights_of(engine)
    moves = [torch.full(weight.shape, 0.37) for weight in before]
    with engine.moved(moves):
        for inside, weight in zip(weights_of(engine), before, strict=True):
            torch.testing.assert_close(inside, (weight.float() + 0.37).to(weight.dtype), atol=0, rtol=0)
    assert all(map(torch.equal, weights_of(engine), before))
    with pytest.raises(Planted), engine.moved(moves):
        raise Planted
    assert all(map(torch.equal, weights_of(engine), before))


@pytest.mark.parametrize(("zero_stage", "dtype"), [PLAIN, ZERO_1, BFLOAT16])
def test_a_step_descends_from_the_old_weights_along_the_gradient_at_the_moved_ones(make_engine, zero_stage, dtype):
    """The first step of Adam goes by the learning rate in the gradient's sign."""
    engine, network = make_engine(zero_stage, dtype), ScalarModel(build_network())
    before = weights_of(engine)
    moves = [0.05 * torch.randn(w.shape, generator=torch.Generator().manual_seed(w.numel())) for w in before]
    with torch.no_grad():
        for parameter, move in zip(network.parameters(), moves, strict=True):
            parameter.add_(move)
    gradients = torch.autograd.grad(mean_square(network, BATCH), list(network.parameters()))
    with engine.moved(moves):
        engine.accumulate([BATCH], lambda batch: mean_square(engine.forward, batch))
    engine.step(1.0)
    for new, old, gradient in zip(weights_of(engine), before, gradients, strict=True):
        clear = gradient.abs() > 0.1 * gradient.abs().max()
        step = (new.float() - old.float())[clear]
        expected = -1e-2 * gradient[clear].sign()
        torch.testing.assert_close(step, expected, atol=1e-6 if dtype == "float32" else 4e-3, rtol=0)


@pytest.mark.parametrize(("zero_stage", "dtype"), [PLAIN, ZERO_1, BFLOAT16])
def test_gradients_are_those_of_plain_torch_and_leave_the_next_step_as_it_is(make_engine, zero_stage, dtype):
    network = ScalarModel(build_network()).to(torch.float32 if dtype == "float32" else torch.bfloat16)
    total = sum(mean_square(network, batch) for batch in (BATCH, OTHER))
    expected = torch.autograd.grad(total, list(network.parameters()))
    asked, other = make_engine(zero_stage, dtype), make_engine(zero_stage, dtype)
    found = asked.gradients([BATCH, OTHER], lambda batch: mean_square(asked.module, batch))
    scale = max(float(gradient.abs().max()) for gradient in expected)
    for gradient, reference in zip(found, expected, strict=True):
        assert gradient.dtype == torch.float32
        tolerance = 1e-6 if dtype == "float32" else 2e-2
        torch.testing.assert_close(gradient, reference.float(), atol=tolerance * scale, rtol=tolerance)
    for engine in (asked, other):
        train(engine, 1)
    assert all(map(torch.equal, weights_of(asked), weights_of(other)))


@pytest.mark.parametrize(("zero_stage", "dtype"), [PLAIN, ZERO_1, BFLOAT16])
def test_second_moments_are_adams_without_their_bias_and_none_before_a_step(make_engine, zero_stage, dtype):
    engine = make_engine(zero_stage, dtype)
    assert engine.second_moments() is None
    moments = None
    for step in range(1, 4):
        gradients = engine.gradients([BATCH], lambda batch: mean_square(engine.module, batch))
        squares = [(1 - BETA2) * gradient.square() for gradient in gradients]
        moments = [BETA2 * old + new for old, new in zip(moments, squares, strict=True)] if moments else squares
        train(engine, 1)
        for found, running in zip(engine.second_moments(), moments, strict=True):
            expected = running / (1 - BETA2**step)
            torch.testing.assert_close(found, expected, atol=1e-4 * float(expected.max()), rtol=2e-3)
    engine.reset_optimizer()
    assert engine.second_moments() is None


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_an_engine_of_a_small_model_maps_no_gigabytes(make_engine, zero_stage):
    process = psutil.Process()
    train(make_engine(0, "float32"), 1)
    before = process.memory_info().vms
    train(make_engine(zero_stage, "float32"), 1)
    assert process.memory_info().vms - before < 2**29


@pytest.mark.parametrize(
    ("zero_stage", "dtype"), [PLAIN, ZERO_1, BFLOAT16, (2, "float32"), (3, "float32"), (3, "bfloat16")]
)
@pytest.mark.parametrize("num_before", [0, 2])
def test_a_restored_engine_goes_on_bit_for_bit(make_engine, zero_stage, dtype, num_before):
    asked = make_engine(zero_stage, dtype)
    train(asked, 3)
    asked.reset_optimizer()
    train(asked, num_before)
    state = asked.capture()
    other = make_engine(zero_stage, dtype, state.weights)
    other.restore(state)
    for engine in (asked, other):
        train(engine, 2)
    captured, again = asked.capture(), other.capture()
    assert captured.num_steps == again.num_steps == num_before + 2
    for kind in captured.tensors:
        for name, tensor in captured.tensors[kind].items():
            assert torch.equal(tensor, again.tensors[kind][name]), (kind, name)
    ours, theirs = asked.weights(), other.weights()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def captured(engine):
    """All tensors of a capture."""
    state = engine.capture()
    return [tensor for tensors in (*state.tensors.values(), state.weights) for tensor in tensors.values()]


@pytest.mark.parametrize(("zero_stage", "dtype"), [PLAIN, BFLOAT16])
def test_a_capture_is_made_in_the_memory_of_the_last_one_with_the_state_of_its_own_time(make_engine, zero_stage, dtype):
    engine = make_engine(zero_stage, dtype)
    train(engine, 1)
    first = captured(engine)
    places, old = [tensor.data_ptr() for tensor in first], [tensor.clone() for tensor in first]
    train(engine, 1)
    assert [tensor.data_ptr() for tensor in captured(engine)] == places
    assert not all(torch.equal(*both) for both in zip(old, first, strict=True))
    weights = engine.capture().weights
    assert all(torch.equal(weights[name], tensor) for name, tensor in engine.weights().items())


@pytest.mark.parametrize(("zero_stage", "dtype"), [PLAIN, BFLOAT16])
def test_captures_are_made_in_reserved_memory_and_are_those_of_an_engine_without(make_engine, zero_stage, dtype):
    engines = make_engine(zero_stage, dtype), make_engine(zero_stage, dtype)
    engines[1].reserve()
    places = {tensor.data_ptr() for tensor in engines[1]._copies.values()}
    for engine in engines:
        train(engine, 1)
    expected, found = map(captured, engines)
    assert {tensor.data_ptr() for tensor in found} == places
    assert all(torch.equal(*both) for both in zip(expected, found, strict=True))


def skip(engine, factor):
    """A step on two parts, the first of which has a loss times ``factor``."""
    factors = iter((factor, 1.0))
    engine.accumulate([BATCH, OTHER], lambda batch: next(factors) * mean_square(engine.forward, batch))
    return engine.step(1.0)


def full_state(engine):
    return [*engine.weights().values(), *engine.second_moments()]


EVERY_KIND = [PLAIN, ZERO_1, (2, "float32"), (3, "float32"), BFLOAT16, (2, "bfloat16"), (3, "bfloat16")]


@pytest.mark.parametrize(("zero_stage", "dtype"), EVERY_KIND)
def test_a_step_whose_gradient_is_not_finite_changes_no_bit_of_this_step_or_of_later_ones(
    make_engine, zero_stage, dtype
):
    engine, other = (make_engine(zero_stage, dtype, max_skipped_steps=2) for _ in range(2))
    for each in (engine, other):
        train(each, 2)
    before = full_state(engine)
    for factor in (math.nan, math.inf):
        assert math.isnan(skip(engine, factor))
    assert all(map(torch.equal, full_state(engine), before))
    for each in (engine, other):
        train(each, 2)
    assert all(map(torch.equal, full_state(engine), full_state(other)))


def test_too_many_skipped_steps_in_a_row_are_an_error_and_a_good_one_between_starts_the_count_again(make_engine):
    engine = make_engine(*PLAIN, max_skipped_steps=2)
    for _ in range(2):
        skip(engine, math.nan)
        skip(engine, math.nan)
        train(engine, 1)
    skip(engine, math.nan)
    skip(engine, math.nan)
    with pytest.raises(RunError, match="gradient is not finite"):
        skip(engine, math.nan)


def test_a_process_of_a_deterministic_run_refuses_operations_that_are_not() -> None:
    for is_deterministic in (True, False):
        config = tiny_run(deterministic=is_deterministic)
        start_process(config, config.pools.policy)
        assert torch.are_deterministic_algorithms_enabled() == is_deterministic
