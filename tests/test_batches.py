import numpy as np
import pytest
import torch
from tiny_models import pad_batch

from ocrm_ray.batches import SequenceTable, cut_rows, length_chunks, pad_rows
from ocrm_ray.records import Sequence

SEQUENCES = [
    Sequence((5, 6, 7), (8, 2), True),
    Sequence((9,), (10, 11, 12, 2), True),
    Sequence((13, 14), (15,), False),
]


def test_rows_are_padded_on_the_right():
    batch = pad_batch(SEQUENCES, pad_id=2)
    assert batch.tokens.tolist() == [[5, 6, 7, 8, 2], [9, 10, 11, 12, 2], [13, 14, 15, 2, 2]]
    assert batch.last_positions.tolist() == [4, 4, 2]


def test_response_mask_covers_responses_even_where_padding_is_eos():
    mask = pad_batch(SEQUENCES, pad_id=2).response_mask
    assert mask.tolist() == [[True, True, False, False], [True, True, True, True], [True, False, False, False]]


def test_predicting_position_is_the_column_before_the_token():
    batch = pad_batch(SEQUENCES, pad_id=0)
    positions, mask = batch.predicting_positions(), batch.response_mask
    predicted = batch.tokens.gather(1, positions + 1)
    assert [row[keep].tolist() for row, keep in zip(predicted, mask, strict=True)] == [[8, 2], [10, 11, 12, 2], [15]]


def test_table_gives_any_rows_in_the_order_asked_for():
    batch = SequenceTable(SEQUENCES, pad_id=0).batch([2, 0])
    assert batch.tokens.tolist() == [[13, 14, 15, 0, 0], [5, 6, 7, 8, 2]]
    assert batch.prompt_lengths.tolist() == [2, 3]
    assert batch.response_lengths.tolist() == [1, 2]


def test_chunks_hold_every_index_once_and_do_not_mix_lengths_needlessly():
    lengths = [3, 9, 1, 7, 5, 9, 2]
    chunks = length_chunks(np.array(lengths), 3, 100)
    assert [[lengths[index] for index in chunk] for chunk in chunks] == [[9, 9, 7], [5, 3, 2], [1]]
    assert sorted(index for chunk in chunks for index in chunk) == list(range(7))


def test_chunk_closes_before_its_padded_tokens_exceed_the_budget():
    lengths = [3, 9, 2, 7, 8, 2]
    chunks = length_chunks(np.array(lengths), 10, 20)
    assert [[lengths[index] for index in chunk] for chunk in chunks] == [[9, 8], [7, 3], [2, 2]]


def test_sequence_beyond_the_budget_goes_alone():
    assert length_chunks(np.array([3, 50, 4, 60]), 10, 20) == [[3], [1], [2, 0]]


def ragged_batch(num_rows, spread):
    """One batch of rows sorted by length, 20 tokens of prompt each."""
    lengths = np.sort(np.random.default_rng(0).lognormal(4.5, spread, num_rows).astype(np.int64))[::-1] + 21
    rows = [Sequence((1,) * 20, tuple(range(100, 100 + length - 20)), False) for length in lengths.tolist()]
    return pad_batch(rows, pad_id=0), int(lengths.sum())


@pytest.mark.parametrize("spread", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("num_rows", [32, 128, 1000])
def test_at_most_a_twentieth_of_the_blocks_of_ragged_rows_is_padding(num_rows, spread):
    batch, num_real = ragged_batch(num_rows, spread)
    num_padded = sum(block.tokens.numel() for block in batch.blocks())
    assert 1 - num_real / num_padded <= 0.05
    assert 1 - num_real / batch.tokens.numel() > 0.05


def test_blocks_hold_the_tokens_and_lengths_of_all_rows_in_order():
    batch, _ = ragged_batch(50, 0.8)
    row = 0
    for block in batch.blocks():
        for tokens, prompt, response in zip(block.tokens, block.prompt_lengths, block.response_lengths, strict=True):
            assert (prompt, response) == (batch.prompt_lengths[row], batch.response_lengths[row])
            length = int(prompt + response)
            assert torch.equal(tokens[:length], batch.tokens[row, :length])
            row += 1
    assert row == 50


def test_rows_of_few_tokens_or_of_one_length_stay_one_block():
    assert len(pad_batch(SEQUENCES, pad_id=0).blocks()) == 1
    assert len(pad_batch([Sequence((1,) * 20, (2,) * 20, True)] * 100, pad_id=0).blocks()) == 1


def test_rows_in_any_order_are_cut_behind_the_longest_of_their_block():
    lengths = [100, 300, 300, 10, 200]
    blocks = pad_batch([Sequence((1,), (2,) * (length - 1), False) for length in lengths], pad_id=0).blocks()
    assert [list(block.tokens.shape) for block in blocks] == [[2, 300], [1, 300], [2, 200]]


def test_padded_rows_are_cut_back_to_what_they_were():
    rows = [np.array([1.5, 2.5], np.float32), np.array([3.5], np.float32)]
    cut = cut_rows(pad_rows(rows), torch.tensor([2, 1]))
    assert [row.tolist() for row in cut] == [[1.5, 2.5], [3.5]]
