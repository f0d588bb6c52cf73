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


GROUPS = [
    Sequence((5, 6), (7, 8), True),
    Sequence((5, 6), (9,), True),
    Sequence((10,), (11, 12, 13), False),
    Sequence((5, 6), (14, 15), True),
]


def test_rows_are_padded_on_the_right():
    batch = pad_batch(SEQUENCES, pad_id=2)
    assert batch.tokens.tolist() == [[5, 6, 7, 8, 2], [9, 10, 11, 12, 2], [13, 14, 15, 2, 2]]
    assert batch.last_places.tolist() == [4, 9, 12]
    assert batch.mask is None


def test_response_mask_covers_responses_even_where_padding_is_eos():
    mask = pad_batch(SEQUENCES, pad_id=2).response_mask
    assert mask.tolist() == [[True, True, False, False], [True, True, True, True], [True, False, False, False]]


def test_responses_to_one_prompt_share_a_row_behind_one_copy_of_it():
    batch = SequenceTable(GROUPS, 0, share_prompts=True).batch([0, 1, 2])
    assert batch.tokens.tolist() == [[5, 6, 7, 8, 9], [10, 11, 12, 13, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 2], [0, 1, 2, 3, 0]]
    assert batch.mask is not None
    sees = [[column for column in range(5) if row[column]] for row in batch.mask[0, 0].tolist()]
    assert sees == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 4]]


def test_only_neighbours_of_the_table_share_a_prompt():
    assert len(SequenceTable(GROUPS, 0, share_prompts=True).batch([0, 3]).tokens) == 2


@pytest.mark.parametrize("share_prompts", [False, True])
@pytest.mark.parametrize("indices", [[2, 0, 3, 1], [3], [1, 0]])
def test_places_lead_to_what_predicts_each_token_and_to_the_last_one_in_the_order_asked_for(indices, share_prompts):
    batch = SequenceTable(GROUPS, 0, share_prompts).batch(indices)
    flat, asked = batch.tokens.flatten(), [GROUPS[index] for index in indices]
    before = [(sequence.prompt_ids[-1], *sequence.response_ids)[:-1] for sequence in asked]
    places, mask = batch.predicting, batch.response_mask
    assert [tuple(flat[row[keep]].tolist()) for row, keep in zip(places, mask, strict=True)] == before
    assert flat[batch.last_places].tolist() == [sequence.response_ids[-1] for sequence in asked]
    predicting, tokens = batch.response_tokens()
    assert torch.equal(predicting, places[mask])
    assert tokens.tolist() == [token for sequence in asked for token in sequence.response_ids]


def test_many_long_responses_to_one_prompt_fill_several_rows():
    group = [Sequence((1,) * 12, (2,) * 200, False) for _ in range(7)]
    batch = SequenceTable(group, 0, share_prompts=True).batch(range(7))
    assert [int((row > 0).sum()) for row in batch.tokens] == [612, 412, 412]


def test_chunks_of_a_table_keep_a_row_together_and_name_every_index_once():
    table = SequenceTable(GROUPS, 0, share_prompts=True)
    assert table.chunks(np.array([2, 1, 3, 0]), 128, 6) == [[1, 3], [0], [2]]
    assert table.chunks(np.array([2, 1, 3, 0]), 2, 100) == [[1, 3], [0, 2]]


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
    """One batch of rows with 20 tokens of prompt each, and its real tokens."""
    lengths = np.random.default_rng(0).lognormal(4.5, spread, num_rows).astype(np.int64) + 21
    rows = [Sequence((1,) * 20, tuple(range(100, 100 + length - 20)), False) for length in lengths.tolist()]
    return pad_batch(rows, pad_id=0), int(lengths.sum())


@pytest.mark.parametrize("spread", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("num_rows", [32, 128, 1000])
def test_at_most_a_twentieth_of_the_blocks_of_ragged_rows_is_padding(num_rows, spread):
    batch, num_real = ragged_batch(num_rows, spread)
    num_padded = sum((rows.stop - rows.start) * width for rows, width in batch.blocks())
    assert 1 - num_real / num_padded <= 0.05
    assert 1 - num_real / batch.tokens.numel() > 0.05


def test_blocks_follow_each_other_and_cut_no_row_short():
    batch, _ = ragged_batch(50, 0.8)
    blocks = batch.blocks()
    assert [row for rows, _ in blocks for row in range(rows.start, rows.stop)] == list(range(50))
    assert [width for _, width in blocks] == [int(batch.row_lengths[rows].max()) for rows, _ in blocks]
    assert batch.row_lengths.tolist() == (batch.tokens > 0).sum(1).tolist()


def test_rows_of_few_tokens_or_of_one_length_stay_one_block():
    assert len(pad_batch(SEQUENCES, pad_id=0).blocks()) == 1
    assert len(pad_batch([Sequence((1,) * 20, (2,) * 20, True)] * 100, pad_id=0).blocks()) == 1


def test_rows_of_a_batch_are_sorted_by_length_whatever_the_order_asked_for():
    lengths = [100, 300, 300, 10, 200]
    batch = pad_batch([Sequence((1,), (2,) * (length - 1), False) for length in lengths], pad_id=0)
    assert batch.row_lengths.tolist() == [300, 300, 200, 100, 10]
    assert [width for _, width in batch.blocks()] == [300, 200, 100]


def test_padded_rows_are_cut_back_to_what_they_were():
    rows = [np.array([1.5, 2.5], np.float32), np.array([3.5], np.float32)]
    cut = cut_rows(pad_rows(rows), torch.tensor([[True, True], [True, False]]))
    assert [row.tolist() for row in cut] == [[1.5, 2.5], [3.5]]
